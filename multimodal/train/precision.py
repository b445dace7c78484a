"""Which precision a run on a CPU computes in: float32 or bfloat16, whichever is faster at the run's own shapes."""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from multimodal.files import write_atomic
from multimodal.train.display import cpu_name

ROUNDS, SECONDS = 5, 2.0  # what is measured at most
FASTER = 1.1  # how many times as fast bfloat16 has to be, since float32 is more exact
REMEMBERED = 500  # runs


def may_be_faster() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it takes ten times as long as float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def measure(backward: Callable[[torch.dtype], object]) -> float:
    """How many times as fast bfloat16 is as float32: the median over rounds, in each of which both are timed.

    backward: computes the gradients of one batch in a precision.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    start = time.perf_counter()
    for turn in range(ROUNDS + 1):  # the first one warms up
        for dtype, found in seconds.items():
            begin = time.perf_counter()
            backward(dtype)
            found.append(time.perf_counter() - begin)
        if turn and time.perf_counter() - start > SECONDS:
            break
    exact, rounded = (found[1:] for found in seconds.values())
    return statistics.median(a / b for a, b in zip(exact, rounded, strict=True))


def choice(ratio: float) -> tuple[torch.dtype, str]:
    """The faster precision, and why in a few words."""
    if ratio >= FASTER:
        return torch.bfloat16, f"{ratio:.1f} times as fast as float32 here"
    return torch.float32, f"bfloat16 is {ratio:.1f} times as fast here"


def key_of(*parts: Any) -> str:
    """The name of a measurement: this machine, and what is computed with how many threads (anything that json can write)."""
    machine = [cpu_name(), torch.__version__]
    return hashlib.sha256(json.dumps([machine, parts], sort_keys=True, default=repr).encode()).hexdigest()[:32]


def remembered(key: str) -> float | None:
    """The ratio that an earlier run measured."""
    found = _read().get(key)
    return float(found) if isinstance(found, (int, float)) else None


def remember(key: str, ratio: float) -> None:
    """Keep a ratio for later runs; without a writable folder nothing is kept, and the next run measures again."""
    found = {name: value for name, value in _read().items() if name != key} | {key: round(ratio, 3)}
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(dict(list(found.items())[-REMEMBERED:])))
    except OSError:
        pass


def _file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "multimodal" / "precision.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # no file, no JSON, no home
        return {}
    return found if isinstance(found, dict) else {}
