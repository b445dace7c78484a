"""Everything about a training run that is not the model and not the data, and what is chosen for it on this machine."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe(Declared):
    """How to train."""

    steps: int = 1000  # optimiser steps
    batch: int = 64  # samples a step, all tasks together
    accumulate: int = 1  # micro-batches a step; changes memory, not results
    lr: float = 1e-3  # peak
    warmup: float = 0.05  # share of the steps that rise linearly to lr
    final_lr: float = 0.01  # share of lr that the cosine ends at
    optimizer: str = "adamw"  # or "muon": orthogonalised momentum for the core's matrices, AdamW for the rest
    weight_decay: float = 0.05  # on matrices only
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
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"Recipe: optimizer={self.optimizer!r} is none of {', '.join(OPTIMIZERS)}")


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) with AdamW for all that is no matrix of the core.

    Vectors (norms, biases) are never decayed.
    """
    from timm.optim import Muon, param_groups_weight_decay

    if recipe.optimizer == "adamw":
        groups = param_groups_weight_decay(model, recipe.weight_decay)
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=device.type in ("cpu", "cuda"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.dim() == 2 and name.startswith("core.")]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0, "use_fallback": True},
    ]
    return Muon(groups, lr=recipe.lr, momentum=0.95, betas=recipe.betas)


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
