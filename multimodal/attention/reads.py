"""Reads: how values are read from the posterior over keys: by their mean, by a sample, or by a relaxed sample."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError, ShapeError


class Choice(NamedTuple):
    """What a `Hard` read chose.

    key_BHT: the index of the key that each query reads.
    log_p_BHT: its log-probability under the posterior.
    entropy_BHT: the entropy of the posterior, in nats.
    sampled: (B, 1, 1), whether the sample of the batch read one key; those that read the mean have no reward to learn from.
    """

    key_BHT: Tensor
    log_p_BHT: Tensor
    entropy_BHT: Tensor
    sampled: Tensor


class Read(Declared, ABC):
    """How values are read from the posterior over keys. Subclass as a frozen dataclass and write `weigh`."""

    def weights(self) -> nn.Module | None:
        """The module that a layer stores for this read, such as a running mean; `weigh` does not get it."""
        return None

    @abstractmethod
    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        """The weight (B, H, T, M) of each value, from log prior + log likelihood, which is minus infinity for masked keys."""

    def read(self, log_joint_BHTM: Tensor, v_BMHK: Tensor, training: bool) -> tuple[Tensor, Tensor, Choice | None]:
        """(the values read (B, T, H, K), the weights (B, H, T, M), the choice of a `Hard` read or None)."""
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
    """The mean of the values under the posterior (Bahdanau et al. 2015, equation 5), which fused kernels compute."""

    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        return log_joint_BHTM.softmax(-1)


@dataclass(frozen=True)
class Hard(Read):
    """Hard attention: the value of one key, sampled in training, the most probable one in evaluation (Xu et al. 2015, section 4.1).

    It is trained by the score-function gradient (REINFORCE). The reward of a choice is the log-likelihood of the tokens written
    from that row on, minus a moving average of it (their equation 12).

    expected: the share of samples that read the mean instead in training, without which it hardly learns.
    entropy: weight of the bonus on the posterior's entropy, in nats.
    weight: factor of the reward (their lambda_r); below 1 its noise counts less beside the loss.
    ahead: number of tokens, from the choice's own on, that reward it; 1 is exact if a choice affects its own token only, and has
        far less noise; None: all that follow.
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
    """softmax((log posterior + Gumbel noise) / temperature): Jang et al. 2017, equation 2. In evaluation there is no noise.

    temperature: below 1 the weights are nearer to one key, above 1 more even.
    straight_through: only the key of the largest weight is read, and the gradient is that of the softmax.
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
            # minus the logarithm of an exponential variable is a Gumbel variable
            log_joint_BHTM = log_joint_BHTM - torch.empty_like(log_joint_BHTM).exponential_().log()
        relaxed = (log_joint_BHTM / self.temperature).softmax(-1)
        if not self.straight_through:
            return relaxed
        one = F.one_hot(relaxed.argmax(-1), relaxed.shape[-1]).to(relaxed.dtype)
        return one - relaxed.detach() + relaxed


class _Baseline(nn.Module):
    """The moving average of the reward of one token, which is subtracted to reduce the variance of the gradient."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def update(self, reward: Tensor) -> None:
        self.mean.lerp_(reward.detach().to(self.mean.dtype), 0.1)


def reweighted(content_BM: Tensor, before_BM: Tensor, gate_B: Tensor, shift_BK: Tensor, sharpness_B: Tensor) -> Tensor:
    """The weights (B, M) of a Neural Turing Machine (Graves et al. 2014, equations 7 to 9): interpolate, shift, sharpen.

    content_BM: the posterior by content.
    before_BM: the weights of the step before.
    gate_B: the share of the content, from 0 to 1, in the interpolation with the weights before.
    shift_BK: a distribution over the circular shifts -(K - 1) / 2 .. (K - 1) / 2.
    sharpness_B: the power to which weights are raised before they are normalised, 1 or more.
    """
    gated = gate_B[:, None] * content_BM + (1 - gate_B[:, None]) * before_BM
    reach = shift_BK.shape[1] // 2
    shifted = sum(shift_BK[:, i : i + 1] * gated.roll(i - reach, dims=1) for i in range(shift_BK.shape[1]))
    assert isinstance(shifted, Tensor)
    sharp = (shifted + 1e-12) ** sharpness_B[:, None]
    return sharp / sharp.sum(1, keepdim=True)
