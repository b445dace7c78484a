"""Calibration: one number that makes a classifier as sure as it is right."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from multimodal.heads import Classify
from multimodal.measures.answered import Answered
from multimodal.shapes import TaskError

if TYPE_CHECKING:
    from multimodal.network import Network

SMALLEST = 1e-30  # probability


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    temperature: by which logits were divided; above 1 the model had been too sure, below 1 not sure enough.
    before: mean negative log-likelihood of the samples before, in nats.
    after: the same afterwards.
    """

    temperature: float
    before: float
    after: float

    def __str__(self) -> str:
        return f"temperature {self.temperature:.3f}, negative log-likelihood {self.before:.4f} before and {self.after:.4f} after"


def temper(model: "Network", task: str, answered: Answered) -> Calibration:
    """Divide the logits of a classifier by the temperature that makes the wanted classes most likely (Guo et al. 2017).

    The last layer's weights are divided, so that every use of the model is calibrated, and no answer changes.

    Raises:
        TaskError: the task does not classify, or its last layer was replaced, as by `quantize` or adapters.
    """
    head, readout = model.packer.head(task), model.readout(task)
    linear = getattr(readout, "linear", None)
    if not isinstance(head, Classify):
        raise TaskError(f"task {task!r}: {type(head).__name__} is not calibrated; only Classify is")
    if type(linear) is not nn.Linear:
        raise TaskError(
            f"task {task!r}: its last layer is {type(linear).__name__}; calibrate before it is quantized, tied or adapted"
        )
    p, y = np.maximum(answered.probability.astype(np.float64), SMALLEST), answered.classes
    several = y.ndim == 2
    logit = np.log(p) - np.log(np.maximum(1 - p, SMALLEST)) if several else np.log(p)
    target = y if several else np.eye(p.shape[1])[y]
    # as if one more sample were wrong (Platt 1999): samples that are all right would have a temperature of 0
    doubt = 1 / (len(y) + 2)
    aim = (1 - doubt) * target + doubt * (1 - target) / (1 if several else p.shape[1] - 1)

    def slope(scale: float) -> float:
        """The derivative of the negative log-likelihood by the inverse temperature; it rises."""
        return float(((_probability(scale * logit, several) - aim) * logit).sum())

    low, high = -6.0, 6.0  # of log(1 / temperature)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    scale = float(np.exp((low + high) / 2))
    with torch.no_grad():
        for weight in linear.parameters():
            weight.mul_(scale)
    return Calibration(1 / scale, _surprise(logit, target, several), _surprise(scale * logit, target, several))


def _probability(logit: np.ndarray, several: bool) -> np.ndarray:
    if several:
        return 1 / (1 + np.exp(-logit))
    e = np.exp(logit - logit.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _surprise(logit: np.ndarray, target: np.ndarray, several: bool) -> float:
    p = _probability(logit, several)
    if several:
        return float(-np.log(np.maximum(np.where(target > 0, p, 1 - p), SMALLEST)).mean())
    return float(-np.log(np.maximum((p * target).sum(1), SMALLEST)).mean())
