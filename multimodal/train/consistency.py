"""Compares settings, data and weights of all processes before the first step; a difference is an error in all of them."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from multimodal.checkpoint import declarations
from multimodal.data import Batches, Packs, is_indexed, preserved_rng, seed_generators
from multimodal.declare import plain
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.texts import shortened
from multimodal.train.processes import Processes
from multimodal.train.recipe import Recipe
from multimodal.train.state import unequal
from multimodal.versions import installed_version

PACKAGES = ("multimodal-stream", "multimodal-tokenizers", "numpy", "timm", "safetensors")
LOCAL = ("workers", "device", "cache")  # settings that may differ between processes
MOST_SHOWN, LONGEST_SHOWN = 4, 60  # differences in a message, characters of a value
FAILED = "failed"


@contextmanager
def equal_in_all_processes(processes: Processes) -> Iterator[dict[str, Any]]:
    """Yields a dictionary for the settings of this process (JSON values by name); after the block those of all are compared.

    Raises:
        ConfigError: in every process; it names the differences, or the error of another process inside the block.
    """
    settings: dict[str, Any] = {}
    try:
        yield settings
    except Exception as error:
        processes.all_gather({FAILED: f"{type(error).__name__}: {error}"})  # else the others would wait for this one
        raise
    found = processes.all_gather(settings)
    for rank, other in enumerate(found):
        if FAILED in other:
            raise ConfigError(f"fit: process {rank} of {processes.count} cannot begin: {other[FAILED]}")
    for rank, other in enumerate(found):
        names = [_difference(name, one, two, rank) for name, one, two in unequal(found[0], other)]
        if names:
            more = f"; and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
            raise ConfigError(
                f"fit: the processes do not agree: {'; '.join(names[:MOST_SHOWN])}{more}. All have to be started with the same "
                "program, data and versions"
            )


def _difference(name: str, one: Any, two: Any, rank: int) -> str:
    """'tasks[1].weight is 1 in process 0 and 2 in process 3'; of lists the first entry that differs."""
    while isinstance(one, list) and isinstance(two, list) and one and two:
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        if at == min(len(one), len(two)):
            return f"{name} has {len(one)} entries in process 0 and {len(two)} in process {rank}"
        name, one, two = f"{name}[{at}]", one[at], two[at]
        if isinstance(one, dict) and isinstance(two, dict):
            inner, one, two = next(iter(unequal(one, two)))
            name = f"{name}.{inner}"
    first, second = (shortened(repr(value), LONGEST_SHOWN) for value in (one, two))
    return f"{name} is {first} in process 0 and {second} in process {rank}"


def settings_of(
    model: Model,
    recipe: Recipe,
    device: torch.device,
    dataset: Batches | Packs,
    sizes: Mapping[str, Mapping[str, int | None]],
) -> dict[str, Any]:
    """What must be equal in every process: declarations, settings, sizes and some samples of the data, versions, weights."""
    return plain(
        {
            "versions": _versions(),
            **declarations(model),
            "recipe": {name: value for name, value in recipe.config().items() if name not in LOCAL},
            "device": device.type,
            **sizes,
            "samples": _samples(dataset),
            "weights": {name: _digest(tensor) for name, tensor in model.state_dict().items()},
            "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        }
    )


def _versions() -> dict[str, str | None]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__, **{name: installed_version(name) for name in PACKAGES}}


def _digest(tensor: Tensor) -> str:
    """A text of a tensor's type, shape and checksum."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {crc32(raw):08x}"  # type: ignore[arg-type]


def _samples(dataset: Batches | Packs) -> dict[str, dict[str, str]]:
    """Checksums of the first, middle and last sample of each task; sizes alone would not show files in another order.

    Samples that differ when they are read again with the same seed are not compared.
    """
    found = {}
    for pattern, source in dataset.fetch.data.items():
        if not is_indexed(source):
            continue  # reading would advance an iterator
        found[pattern] = {
            f"sample {index}": text
            for index in sorted({0, len(source) // 2, len(source) - 1})
            # a source may draw from a generator that is not seeded here
            if (text := _sample(source, index)) == _sample(source, index)
        }
    return found


def _sample(source: Any, index: int) -> str:
    """A checksum of a sample, or the name of the error that reading it raised."""
    with preserved_rng():
        seed_generators("agreement", index)  # the key only has to be the same in both readings
        try:
            return f"{crc32(repr(_identity(source[index])).encode()):08x}"
        except Exception as error:
            return type(error).__name__  # broken samples are handled during training


def _identity(value: Any) -> Any:
    """What identifies a value on every machine: the name of a file, the bytes of numbers and pictures."""
    if isinstance(value, Mapping):
        return sorted((str(name), _identity(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return [len(value), *map(_identity, value[:8])]
    if isinstance(value, (str, Path)):
        return Path(value).name if len(str(value)) < 4096 else crc32(str(value).encode())
    if isinstance(value, (int, float, type(None))):
        return value
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), crc32(np.ascontiguousarray(value).tobytes())
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture of PIL
        return value.size, value.mode, crc32(value.tobytes())
    return type(value).__name__
