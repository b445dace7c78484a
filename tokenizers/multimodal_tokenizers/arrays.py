"""Arrays of numbers, as several kinds read and show them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(value: Any) -> Any:
    """A tensor as an array, of float32 if it is bfloat16, which NumPy lacks; any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def as_features(array: Any) -> Tensor:
    """A new float32 tensor of numbers; those beyond its range become infinite, which `Tokenizer.__call__` refuses."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, dtype=np.float32))


def grey_levels(frames_NF: Tensor) -> Tensor:
    """Frames as a picture (Y, X, 1) in 0..1, the first feature at the bottom."""
    level = (frames_NF - frames_NF.min()) / (frames_NF.max() - frames_NF.min() + 1e-6)
    return level.T.flip(0)[:, :, None]
