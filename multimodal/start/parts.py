"""The parts of a run's data as files: a line of JSON a sample, or shards where values are no JSON."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multimodal.data import Shards, write_shards
from multimodal.files import part_path
from multimodal.progress import progress_bar
from multimodal.shapes import CheckpointError, ConfigError

MOST_VALUES = 5_000_000  # of all samples together; more become shards, which are read from the disk


class Chosen:
    """Some of the samples, by their numbers."""

    def __init__(self, sample: Callable[[int], dict[str, Any]], rows: Sequence[int]) -> None:
        self.sample, self.rows = sample, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(self.rows[index])


def write_parts(folder: Path, parts: Mapping[str, Chosen], quiet: bool) -> bool:
    """Write each part that has samples into a folder; returns whether they are shards."""
    some = [samples[i] for samples in parts.values() for i in range(min(len(samples), 20))]
    values = sum(len(samples) for samples in parts.values()) * max(map(_size, some))
    shards = values > MOST_VALUES or not all(_is_json(value) for sample in some for value in sample.values())
    if not shards:
        try:
            for name, samples in parts.items():
                if len(samples):
                    _write_lines(folder / f"{name}.jsonl", samples)
        except ValueError:  # a sample beyond the first ones has another value
            shards = True
    if shards:
        for name, samples in parts.items():
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
            if len(samples):
                with progress_bar(f"writing {name}", None, quiet=quiet):
                    write_shards(samples, folder / name)
    return shards


def read_part(folder: Path, name: str, shards: bool) -> Any:
    """The samples of a part, as script.py reads them; [] if there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if shards:
        return Shards(folder / name) if (folder / name).is_dir() else []
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}; give another --folder") from error


def _write_lines(path: Path, samples: Chosen) -> None:
    """Write a file of JSON lines; it is complete or absent."""
    part = part_path(path.parent)
    try:
        with part.open("x", encoding="utf-8") as file:
            for i in range(len(samples)):
                sample = samples[i]
                if not all(map(_is_json, sample.values())):
                    raise ValueError("no JSON")
                file.write(json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _is_json(value: Any) -> bool:
    """Whether JSON gives back the same value."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or type(value) in (str, int, bool)


def _size(value: Any) -> int:
    return sum(map(_size, value.values())) if isinstance(value, dict) else len(value) if isinstance(value, list) else 1
