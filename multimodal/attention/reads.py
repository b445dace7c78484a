"""Reads: what becomes of the posterior over keys: its mean, a sample, or a relaxed sample of the values."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError, ShapeError


class Choice(NamedTuple):
    """What a hard read chose for each query: the key (B, H, T), its log-probability, the posterior's entropy, and whether it was
    a sample (B, 1, 1): whatever was averaged instead has nothing to learn from its reward."""

    key_BHT: Tensor
    log_p_BHT: Tensor
    entropy_BHT: Tensor
    sampled: Tensor


class Read(Declared, ABC):
    """A read. Subclass as a frozen dataclass and write `weigh`."""

    def weights(self) -> nn.Module | None:
        """What a layer keeps for this read beside its own weights; none of it reaches `weigh`."""
        return None

    @abstractmethod
    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        """The weight of each key's value, from log prior + log likelihood; keys that may not be seen are minus infinity."""

    def read(self, log_joint_BHTM: Tensor, v_BMHK: Tensor, training: bool) -> tuple[Tensor, Tensor, Choice | None]:
        """(what is read (B, T, H, K), the weights, what was chosen)."""
        weight_BHTM = self.weigh(log_joint_BHTM, training)
        if weight_BHTM.shape != log_joint_BHTM.shape:
            raise ShapeError(
                f"{type(self).__name__}.weigh gave {tuple(weight_BHTM.shape)}; wanted is (samples, heads, queries, keys) = "
                f"{tuple(log_joint_BHTM.shape)}"
            )
        return mean_of(v_BMHK, weight_BHTM), weight_BHTM, None


def mean_of(v_BMHK: Tensor, weight_BHTM: Tensor) -> Tensor:
    """The weighted sum of values: (B, T, H, K)."""
    return torch.einsum("bhtm,bmhk->bthk", weight_BHTM.to(v_BMHK.dtype), v_BMHK)


@dataclass(frozen=True)
class Soft(Read):
    """The posterior mean (Bahdanau et al. 2015, equation 5): what fused kernels compute."""

    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        return log_joint_BHTM.softmax(-1)


@dataclass(frozen=True)
class Hard(Read):
    """One value: a sample in training, the likeliest at test (Xu et al. 2015, section 4.1).

    Learned with the score-function gradient: reward is the log-likelihood of what is written from there on, less a moving average
    of it (their equation 12). expected: the share of samples that read the mean instead, which makes it learn; entropy: the bonus
    on the posterior's entropy, in nats; weight: of the reward (their lambda_r; below 1 the noise weighs less beside the loss).
    ahead: how many tokens from its own on reward a choice; 1 is exact where a choice reaches its own token only, and has far less
    noise; None: all that come.
    """

    expected: float = 0.5
    entropy: float = 0.01
    weight: float = 1.0
    ahead: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.expected <= 1:
            raise ConfigError(f"Hard: expected={self.expected} is not in 0 to 1")
        for name in ("entropy", "weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Hard: {name}={getattr(self, name)} must not be negative")
        if self.ahead is not None and self.ahead < 1:
            raise ConfigError(f"Hard: ahead={self.ahead} rewards nothing; use 1 or more, or None for all that comes")

    def weights(self) -> nn.Module:
        return _Baseline()

    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        key_BHT = self._choose(log_joint_BHTM, training)
        return F.one_hot(key_BHT, log_joint_BHTM.shape[-1]).to(log_joint_BHTM.dtype)

    def read(self, log_joint_BHTM: Tensor, v_BMHK: Tensor, training: bool) -> tuple[Tensor, Tensor, Choice | None]:
        key_BHT = self._choose(log_joint_BHTM, training)
        index = key_BHT.transpose(1, 2)[..., None].expand(-1, -1, -1, v_BMHK.shape[-1])
        value_BTHK = v_BMHK.gather(1, index)
        weight_BHTM = F.one_hot(key_BHT, log_joint_BHTM.shape[-1]).to(log_joint_BHTM.dtype)
        log_p = log_joint_BHTM.log_softmax(-1)
        if not training:
            sampled = torch.ones(len(key_BHT), 1, 1, dtype=torch.bool, device=key_BHT.device)
        else:
            sampled = torch.rand(len(key_BHT), 1, 1, device=key_BHT.device) >= self.expected
            weight_BHTM = torch.where(sampled[..., None], weight_BHTM, log_p.exp())
            value_BTHK = torch.where(sampled[..., None], value_BTHK, mean_of(v_BMHK, log_p.exp()))
        entropy_BHT = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
        return (
            value_BTHK,
            weight_BHTM,
            Choice(key_BHT, log_p.gather(-1, key_BHT[..., None])[..., 0], entropy_BHT, sampled),
        )

    @staticmethod
    def _choose(log_joint_BHTM: Tensor, training: bool) -> Tensor:
        if not training:
            return log_joint_BHTM.argmax(-1)
        p = log_joint_BHTM.detach().softmax(-1)
        return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1])


@dataclass(frozen=True)
class Gumbel(Read):
    """softmax((log posterior + Gumbel noise) / temperature): Jang et al. 2017, equation 2. At test without the noise.

    straight_through: the largest alone is read, and the gradient is that of the softmax; at test the likeliest.
    temperature: below 1 nearer to one key, above 1 more even.
    """

    temperature: float = 1.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"Gumbel: temperature={self.temperature} must be above 0 and finite; Hard reads one value"
            )

    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        if training:
            log_joint_BHTM = log_joint_BHTM - torch.empty_like(log_joint_BHTM).exponential_().log()
        relaxed = (log_joint_BHTM / self.temperature).softmax(-1)
        if not self.straight_through:
            return relaxed
        one = F.one_hot(relaxed.argmax(-1), relaxed.shape[-1]).to(relaxed.dtype)
        return one - relaxed.detach() + relaxed


class _Baseline(nn.Module):
    """The moving average of the reward of one token."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def update(self, reward: Tensor) -> None:
        self.mean.lerp_(reward.detach().to(self.mean.dtype), 0.1)


def reweighted(content_BM: Tensor, before_BM: Tensor, gate_B: Tensor, shift_BK: Tensor, sharpness_B: Tensor) -> Tensor:
    """The re-weighting of a Neural Turing Machine (Graves et al. 2014, equations 7 to 9): interpolate, shift around, sharpen.

    content_BM: the posterior by content; before_BM: the weights of the step before; shift_BK: a distribution over the shifts
    -(K - 1) / 2 .. (K - 1) / 2. Returns weights (B, M) that sum to 1.
    """
    gated = gate_B[:, None] * content_BM + (1 - gate_B[:, None]) * before_BM
    reach = shift_BK.shape[1] // 2
    shifted = sum(shift_BK[:, i : i + 1] * gated.roll(i - reach, dims=1) for i in range(shift_BK.shape[1]))
    assert isinstance(shifted, Tensor)
    sharp = (shifted + 1e-12) ** sharpness_B[:, None]
    return sharp / sharp.sum(1, keepdim=True)
