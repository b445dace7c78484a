"""Scores: the log-likelihood of a query under a key, up to a function of the query alone."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from multimodal.declare import Declared


class Score(Declared, ABC):
    """A score that factors into a product of features, so that every fused kernel can run it."""

    @abstractmethod
    def features(self, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
        """(q', k', scale) with score = scale * q' . k'."""


@dataclass(frozen=True)
class ScaledDotProduct(Score):
    """q . k / sqrt(K): Vaswani et al. 2017, equation 1."""

    def features(self, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
        return q_THK, k_TGK, 1 / math.sqrt(q_THK.shape[-1])


@dataclass(frozen=True)
class Cosine(Score):
    """sharpness * cos(q, k): the content-based score of Graves et al. 2014, equation 6."""

    sharpness: float = 10.0

    def features(self, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
        return F.normalize(q_THK, dim=-1), F.normalize(k_TGK, dim=-1), self.sharpness
