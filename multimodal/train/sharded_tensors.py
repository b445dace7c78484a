"""Sharded tensors on disk, without pickle: every process writes its pieces, and processes of any number and layout may read them.

pieces/index.json          shape and type of each tensor, and its pieces: the process, the name in its file, the first row and the
                           last one + 1 along each axis. Format 1 had an axis and the number of rows in each process instead
pieces/00000.safetensors   the pieces that process 0 has written: its own ones, and of copies those of the first process
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multimodal.attention.exchange import local
from multimodal.checkpoint import NAMES_OF_KINDS, Header, write_tensors
from multimodal.files import check_fields, read_json
from multimodal.shapes import CheckpointError
from multimodal.texts import short_repr
from multimodal.train.processes import Processes
from multimodal.train.split import RowOrder, box_of

FORMAT = 2
INDEX = "index.json"
Box = list[tuple[int, int]]


class Piece(NamedTuple):
    """A part of a tensor in the file of a process.

    process: its number.
    key: the name of the piece in that file.
    box: the first row and the last one + 1 along each axis.
    """

    process: int
    key: str
    box: Box


def write_sharded(
    folder: Path, tensors: Mapping[str, Tensor], processes: Processes, order: RowOrder | None = None
) -> None:
    """Write `tensors`, some of which are sharded over processes, with their rows in their own order. All processes must call this.

    order: how the rows lie in memory; None: in their own order.

    Raises:
        OSError: in every process, if one of them could not write.
    """
    order = order or RowOrder()
    boxes = processes.all_gather([box_of(tensor) for tensor in tensors.values()])
    own: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        pieces: list[Piece] = []
        seen: set[tuple[tuple[int, int], ...]] = set()
        for process, box in enumerate(each[i] for each in boxes):
            if tuple(box) in seen or any(start == stop for start, stop in box):
                continue  # a copy is written by the first process that has it
            seen.add(tuple(box))
            for inside, part in order.boxes(name, box):
                key = name if part == box else f"{name}@{part[0][0]}"
                pieces.append(Piece(process, key, part))
                if process == processes.rank:
                    own[key] = local(tensor)[inside].detach().cpu().clone().contiguous()
        if not seen and processes.rank == 0:  # a tensor without numbers
            pieces.append(Piece(0, name, [(0, size) for size in tensor.shape]))
            own[name] = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": NAMES_OF_KINDS[tensor.dtype],
            "pieces": [
                {"process": p.process, "key": p.key, "start": [a for a, _ in p.box], "stop": [b for _, b in p.box]}
                for p in pieces
            ],
        }
    failed = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(own, folder / _file(processes.rank))
        if processes.rank == 0:
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
        if index["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"{folder / INDEX}: format {index['format']}, but this version reads 1 and {FORMAT}; update multimodal-stream"
            )
        self.header: Header = {}
        self._pieces: dict[str, list[Piece]] = {}
        for name, entry in index["tensors"].items():
            where = f"{folder / INDEX}: {short_repr(name)}"
            check_fields(where, entry, {"shape": list, "dtype": str}, CheckpointError)
            if not _are_counts(entry["shape"]):
                raise CheckpointError(f"{where}: 'shape' is {short_repr(entry['shape'])}, wanted whole numbers")
            self.header[name] = tuple(entry["shape"]), entry["dtype"]
            read = _rows_of_processes if index["format"] == 1 else _pieces
            self._pieces[name] = read(where, name, entry, index["processes"])

    def read(self, like: Mapping[str, Tensor], order: RowOrder | None = None) -> dict[str, Tensor]:
        """New tensors, sharded like those in `like`; each process reads what it needs.

        order: how the rows shall lie in memory; None: in their own order.

        Raises:
            CheckpointError: a file is missing or damaged, or holds tensors of another shape.
        """
        order, found = order or RowOrder(), {}
        # a file has pieces of many tensors, so it stays open
        with ExitStack() as stack:
            files: dict[int, Any] = {}
            for name, wanted in like.items():
                if self.header[name][0] != tuple(wanted.shape):
                    raise CheckpointError(
                        f"{self.folder}: {short_repr(name)} is {self.header[name][0]} in the files, wanted {tuple(wanted.shape)}"
                    )
                fresh = torch.empty_like(wanted)
                with torch.no_grad():
                    for inside, box in order.boxes(name, box_of(wanted)):
                        self._fill(local(fresh)[inside], name, box, files, stack)
                found[name] = fresh
        return found

    def _fill(self, part: Tensor, name: str, box: Box, files: dict[int, Any], stack: ExitStack) -> None:
        """Copy a box of a tensor out of the pieces that hold some of it."""
        for piece in self._pieces[name]:
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)]
            if all(start < stop for start, stop in both):
                source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, piece.box, strict=True))
                target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, box, strict=True))
                part[target].copy_(self._rows(name, piece, source, files, stack))

    def _rows(self, name: str, piece: Piece, rows: Any, files: dict[int, Any], stack: ExitStack) -> Tensor:
        path = self.folder / _file(piece.process)
        try:
            if piece.process not in files:
                files[piece.process] = stack.enter_context(safe_open(path, framework="pt"))
            found = files[piece.process].get_slice(piece.key)
            shape = [stop - start for start, stop in piece.box]
            if list(found.get_shape()) != shape or found.get_dtype() != self.header[name][1]:
                raise CheckpointError(
                    f"{path}: {short_repr(piece.key)} is {found.get_dtype()} {tuple(found.get_shape())}, and {INDEX} promises "
                    f"{self.header[name][1]} {tuple(shape)}"
                )
            return found[rows] if shape else files[piece.process].get_tensor(piece.key)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: missing, damaged or cut short: {error}") from error


def _pieces(where: str, name: str, entry: Mapping[str, Any], processes: int) -> list[Piece]:
    """The pieces of a tensor in format 2.

    Raises:
        CheckpointError: they are not well formed, or do not make the tensor.
    """
    check_fields(where, entry, {"pieces": list}, CheckpointError)
    found, shape = [], entry["shape"]
    for piece in entry["pieces"]:
        check_fields(where, piece, {"process": int, "key": str, "start": list, "stop": list}, CheckpointError)
        start, stop = piece["start"], piece["stop"]
        fits = _are_counts(start) and _are_counts(stop) and len(start) == len(stop) == len(shape)
        inside = fits and all(a <= b <= n for a, b, n in zip(start, stop, shape, strict=True))
        if not inside or not 0 <= piece["process"] < processes:
            raise CheckpointError(f"{where}: no piece of the shape {short_repr(shape)}: {short_repr(piece)}")
        found.append(Piece(piece["process"], piece["key"], list(zip(start, stop, strict=True))))
    if not _make_whole([piece.box for piece in found], shape):
        raise CheckpointError(f"{where}: its pieces do not make the shape {short_repr(shape)}, each part of it once")
    return found


def _make_whole(boxes: list[Box], shape: list[int]) -> bool:
    """Whether the boxes cover a shape, each part once."""
    if not all(shape):
        return True
    # the cells between all edges of boxes; within a cell nothing changes
    edges = [sorted({0, size, *(edge for box in boxes for edge in box[axis])}) for axis, size in enumerate(shape)]
    at = [{edge: number for number, edge in enumerate(each)} for each in edges]
    covered = np.zeros([len(each) - 1 for each in edges], dtype=np.int64)
    for box in boxes:
        covered[tuple(slice(each[start], each[stop]) for each, (start, stop) in zip(at, box, strict=True))] += 1
    return bool((covered == 1).all())


def _rows_of_processes(where: str, name: str, entry: Mapping[str, Any], processes: int) -> list[Piece]:
    """The pieces of a tensor in format 1: along one axis so many rows of each process, or all of it in process 0.

    Raises:
        CheckpointError: they are not well formed, or do not make the tensor.
    """
    shape = entry["shape"]
    whole = [(0, size) for size in shape]
    if "rows" not in entry:
        return [Piece(0, name, whole)]
    check_fields(where, entry, {"axis": int, "rows": list}, CheckpointError)
    axis, rows = entry["axis"], entry["rows"]
    fits = 0 <= axis < len(shape) and _are_counts(rows) and len(rows) == processes
    if not fits or sum(rows) != shape[axis]:
        raise CheckpointError(
            f"{where}: rows {short_repr(rows)} of axis {axis} do not make the shape {short_repr(shape)}"
        )
    found, at = [], 0
    for process, size in enumerate(rows):
        found.append(Piece(process, name, [*whole[:axis], (at, at + size), *whole[axis + 1 :]]))
        at += size
    return found


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _file(process: int) -> str:
    return f"{process:05d}.safetensors"
