"""Everything about a training run that is not the model and not the data, and what is chosen for it on this machine."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from multimodal.declare import Declared
from multimodal.shapes import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Recipe(Declared):
    """How to train."""

    steps: int = 1000  # optimiser steps
    batch: int = 64  # samples a step, all tasks together
    accumulate: int = 1  # micro-batches a step; changes memory, not results
    lr: float = 1e-3  # peak
    warmup: float = 0.05  # share of the steps that rise linearly to lr
    final_lr: float = 0.01  # share of lr that the cosine ends at
    weight_decay: float = 0.05  # AdamW, on matrices only
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest gradient norm; 0: none
    ema: float = 0.0  # decay of averaged weights, which then become the model; 0: none
    precision: str = "auto"  # float32, bfloat16 (autocast), or auto: measured
    device: str = "auto"
    workers: int = 0  # data processes; 0: in the main one
    evaluate_every: int = 0  # steps; 0: at the end only
    checkpoint_every: int = 0  # steps; 0: at the end only
    seed: int = 0  # order of data, augmentation, dropout

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Recipe: {name}={getattr(self, name)} must be at least 1")
        if self.batch % self.accumulate:
            raise ConfigError(f"Recipe: batch={self.batch} is not a multiple of accumulate={self.accumulate}")
        if self.lr <= 0 or not 0 <= self.ema < 1 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"Recipe: lr={self.lr} must be positive, ema={self.ema} and warmup={self.warmup} from 0 to 1"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"Recipe: precision={self.precision!r} is none of {', '.join(PRECISIONS)}")


def choose_device(wanted: str) -> torch.device:
    """The device to train on: CUDA, then Apple's, then the CPU.

    Raises:
        ConfigError: a device that is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"Recipe: device={wanted!r} is not there: {str(error).splitlines()[0]}") from error


def choose_precision(wanted: str, device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """The type to compute in, and why in a few words."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "cuda":
        return (
            (torch.bfloat16, "native") if torch.cuda.is_bf16_supported(False) else (torch.float32, "no native bfloat16")
        )
    if device.type != "cpu":
        return torch.float32, "the safe choice here"
    gain = _matmul_ms(torch.float32, width) / _matmul_ms(torch.bfloat16, width)
    chosen = torch.bfloat16 if gain > 1.5 else torch.float32  # below that, casts and other work eat the gain
    return chosen, f"a bfloat16 matmul is {gain:.1f}x as fast here"


def _matmul_ms(dtype: torch.dtype, width: int) -> float:
    x, w = torch.ones(2048, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
    F.linear(x, w)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        F.linear(x, w)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[2]
