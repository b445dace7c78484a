"""Attention over many samples: whether an input is unusual by its evidence, and which memory slots no query reads."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.look.attention_xray import XRay, xray
from multimodal.look.layer_xray import LayerXRay
from multimodal.model import Model
from multimodal.progress import progress_bar
from multimodal.shapes import ConfigError, StreamError

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Novelty:
    """How unusual one input is to the heads, by their evidence.

    z: by layer, the z-score (H,) of each head's evidence; negative: less than usual, no key explains the queries.
    percentile: by layer (H,), the share of known samples with less evidence.
    distance: how far the evidence is from that of known samples; about 1 for one of them.
    p: the share of the held-out known samples that are at least as far, this input counted among them.
    alpha: the input is `unusual` if p is at most this.
    threshold: the distance above which an input is unusual at this alpha; infinite where too few samples are known.
    """

    z: dict[str, Tensor]
    percentile: dict[str, Tensor]
    distance: float
    p: float
    alpha: float
    threshold: float

    @property
    def unusual(self) -> bool:
        """Whether p is at most alpha."""
        return self.p <= self.alpha

    def __str__(self) -> str:
        verdict = "unusual" if self.unusual else "as usual"
        return (
            f"evidence {verdict}: distance {self.distance:.2f} from known samples, unusual above {self.threshold:.2f} "
            f"(p = {self.p:.3f})"
        )


@dataclass(frozen=True)
class Evidence:
    """The evidence of known samples of a task, with which a new input is compared.

    A sample has two numbers for each head: the mean of LSE_j(log prior + score) - log(keys seen), which does not depend on length
    alone, over all queries, and over those that the answer is read from. One half of the samples gives their means, standard
    deviations and correlations, the latter shrunk towards none (Ledoit and Wolf 2004). The distance of an input is
    Mahalanobis', over the square root of the count of numbers: what is unusual together counts, and both signs do, as keys of
    large norm raise evidence. The distances of the other half make p exact whatever the distribution (split conformal, Vovk et al.
    2005): of inputs like the known ones a share of at most alpha is called unusual.

    task: the task of the samples.
    layers: names of the attention layers.
    heads: number of heads of each layer.
    mean_N: mean over the first half, of all heads of all layers over all queries, then of all heads over the answer's.
    deviation_N: standard deviation over the first half.
    precision_NN: inverse of the correlations of the first half, shrunk.
    known_BN: the numbers of the first half, sorted for each head.
    distance_B: the distances of the second half, sorted.
    """

    task: str
    layers: tuple[str, ...]
    heads: tuple[int, ...]
    mean_N: Tensor
    deviation_N: Tensor
    precision_NN: Tensor
    known_BN: Tensor
    distance_B: Tensor

    @classmethod
    def fit(cls, model: Model, task: str, samples: Sequence[Sample], *, quiet: bool = False) -> "Evidence":
        """Measure known samples, at least 20; p can reach 0.01 with 198 or more.

        Raises:
            StreamError: too few samples.
        """
        if len(samples) < 20:
            raise StreamError(f"Evidence.fit: {len(samples)} samples say too little of what is usual; give 20 or more")
        numbers, names, heads = [], (), ()
        for sample in _with_bar(samples, quiet):
            ray = xray(model, task, sample)
            numbers.append(_numbers(ray))
            names, heads = tuple(layer.name for layer in ray.layers), tuple(layer.heads for layer in ray.layers)
        all_BN = torch.stack(numbers)
        # mean and deviation come from other samples than the distances, since p would be too small for those that were fitted
        first_BN, second_BN = all_BN[::2], all_BN[1::2]
        mean_N, deviation_N = first_BN.mean(0), first_BN.std(0).clamp(min=1e-6)
        precision_NN = torch.linalg.inv(_shrunk((first_BN - mean_N) / deviation_N))
        distance_B = _distance((second_BN - mean_N) / deviation_N, precision_NN).sort().values
        return cls(task, names, heads, mean_N, deviation_N, precision_NN, first_BN.sort(0).values, distance_B)

    def threshold(self, alpha: float = 0.05) -> float:
        """The distance above which an input is unusual; infinite where too few samples are known for this alpha.

        Raises:
            ConfigError: alpha is no share.
        """
        if not 0 < alpha < 1:
            raise ConfigError(
                f"Evidence: alpha={alpha} is no share of known inputs; give a number between 0 and 1, such as 0.05"
            )
        # as many held-out samples may be further than an input that is still unusual
        allowed = math.floor(alpha * (len(self.distance_B) + 1) + 1e-9) - 1
        return float(self.distance_B[-1 - allowed]) if allowed >= 0 else math.inf

    def judge(self, ray: XRay, *, alpha: float = 0.05) -> Novelty:
        """Compare one input with the known samples.

        Raises:
            ConfigError: the X-ray of another task or model.
        """
        if ray.task != self.task or tuple(layer.name for layer in ray.layers) != self.layers:
            raise ConfigError(
                f"Evidence.judge: fitted on task {self.task!r} with layers {', '.join(self.layers)}, but this is an X-ray of "
                f"task {ray.task!r} with {', '.join(layer.name for layer in ray.layers)}"
            )
        threshold = self.threshold(alpha)
        new_N = _numbers(ray)
        z_N = (new_N - self.mean_N) / self.deviation_N
        below_N = (self.known_BN < new_N).double().mean(0)
        distance = float(_distance(z_N, self.precision_NN))
        # the input itself counts among the held-out samples, which makes p exact and never 0
        at_least = int((self.distance_B >= distance).sum())
        every = [
            *self.heads,
            len(new_N) - sum(self.heads),
        ]  # of all queries; then of the answer's, which `z` leaves out
        return Novelty(
            dict(zip(self.layers, z_N.split(every), strict=False)),
            dict(zip(self.layers, below_N.split(every), strict=False)),
            distance,
            (at_least + 1) / (len(self.distance_B) + 1),
            alpha,
            threshold,
        )


def _numbers(ray: XRay) -> Tensor:
    """Mean evidence less log(keys seen) of every head of every layer: of all queries, then of those the answer is read from."""
    answering = [layer.only(ray.asked(layer)) for layer in ray.layers]
    return torch.cat([_mean_evidence(layer) for layer in (*ray.layers, *answering)])


def _shrunk(z_BN: Tensor) -> Tensor:
    """Covariance of centred numbers, shrunk towards a multiple of the identity: Ledoit and Wolf 2004."""
    count, width = z_BN.shape
    covariance_NN = z_BN.T @ z_BN / count
    scale = covariance_NN.trace() / width
    away = (covariance_NN - scale * torch.eye(width, dtype=z_BN.dtype)).square().sum()
    # squared distances of each sample's z z' from their mean, without writing these out
    noise = (z_BN.square().sum(1).square().sum() / count - covariance_NN.square().sum()) / count
    share = float((noise / away.clamp(min=1e-12)).clamp(0.0, 1.0))
    shrunk_NN = (1 - share) * covariance_NN + share * scale * torch.eye(width, dtype=z_BN.dtype)
    return shrunk_NN + 1e-6 * torch.eye(width, dtype=z_BN.dtype)  # numbers that never vary have no covariance


def _distance(z_BN: Tensor, precision_NN: Tensor) -> Tensor:
    """Mahalanobis' distance over the square root of the count of numbers."""
    return ((z_BN @ precision_NN) * z_BN).mean(-1).clamp(min=0.0).sqrt()


def _mean_evidence(layer: LayerXRay) -> Tensor:
    count_HT = layer.seen_HTM.sum(-1)
    sees_HT = count_HT > 0
    each_HT = torch.where(sees_HT, layer.evidence_HT - count_HT.clamp(min=1).log(), 0.0)
    return each_HT.sum(-1) / sees_HT.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Usage:
    """How much each slot of a persistent memory was read over many samples.

    usage_HM: N_k, the sum of each slot's responsibilities over all queries, by head.
    queries: the number of queries.
    """

    usage_HM: Tensor
    queries: int

    def dead(self, share: float = 0.01) -> Tensor:
        """Slots (M,) whose usage is below `share` of an even share in every head; `multimodal.zoo.pruned` removes them."""
        even = self.usage_HM.sum(-1, keepdim=True) / self.usage_HM.shape[-1]
        return (self.usage_HM < share * even).all(0)


def usage(model: Model, task: str, samples: Sequence[Sample], *, quiet: bool = False) -> dict[str, Usage]:
    """`Usage` of every persistent memory of a model, by layer.

    Raises:
        ConfigError: it has none. StreamError: there are no samples.
    """
    if not samples:
        raise StreamError("usage: there are no samples")
    sums: dict[str, Usage] = {}
    for sample in _with_bar(samples, quiet):
        memories = [layer for layer in xray(model, task, sample).layers if layer.key_M is None]
        if not memories:
            raise ConfigError(
                "usage: this model has no PersistentMemory; of other layers every sample brings its own keys"
            )
        for layer in memories:
            before = sums.get(layer.name, Usage(torch.zeros_like(layer.usage_HM), 0))
            sums[layer.name] = Usage(before.usage_HM + layer.usage_HM, before.queries + len(layer.query_T))
    return sums


def _with_bar(samples: Sequence[Sample], quiet: bool) -> Iterator[Sample]:
    """The samples, with a progress bar where there is a terminal."""
    with progress_bar("looking", len(samples), quiet=quiet) as bar:
        for sample in samples:
            yield sample
            bar.advance()
