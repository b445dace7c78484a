"""A head for contrastive learning of pairs such as "image <-> text".

left side,  its learned token --core--> state --left map---> unit vector --+
                                                                           +--> scale * cosine (+ bias), each left with each right
right side, its learned token --core--> state --right map--> unit vector --+
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import (
    EncodedSample,
    Head,
    LaidOut,
    Prediction,
    Reading,
    Readout,
    Segment,
    tokens_of,
    wrong_arrow,
)
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, StreamError, check_shapes, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times

FORMS = ("softmax", "sigmoid")
LARGEST_SCALE = 100.0  # of the softmax form, as in section 2.5 of Radford et al.


@final
@dataclass(frozen=True)
class Contrast(Head):
    """Learns vectors of two sides that are close if the sides match; the other pairs of the micro-batch are the negatives.

    Two pairs whose left sides, or whose right sides, have exactly the same tokens are no negatives of each other. Another crop of
    the same photo is another side: if a photo has five captions, draw one of them each time the photo comes.

    width: F, size of a vector.
    form: "softmax" classifies which right side matches a left one among all, and vice versa (CLIP, Radford et al. 2021, arXiv
        2103.00020, figure 3; initial scale 1 / 0.07). "sigmoid" decides for each two whether they match (SigLIP, Zhai et al. 2023,
        arXiv 2303.15343, algorithm 1; initial scale 10 and bias -10).

    Examples:
        >>> task = mm.Task("image <-> text", mm.Contrast(form="sigmoid", width=64))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1), "text": TextBytes()}, mm.Core.tiny(), [task])
        >>> tuple(model.matches("image <-> text", [{"image": square}], [{"text": "square"}, {"text": "circle"}]).shape)
        (1, 2)
    """

    width: int = 256
    form: str = "softmax"
    queries: ClassVar[int] = 2
    measures: ClassVar[tuple[str, ...]] = ("loss", "R@1 right", "R@10 right", "R@1 left", "R@10 left")
    smallest_batch: ClassVar[int] = 2  # the other pair is the negative

    def __post_init__(self) -> None:
        check_whole("Contrast", least=1, width=self.width)
        if self.form not in FORMS:
            raise ConfigError(f"Contrast: form={self.form!r} is neither {' nor '.join(map(repr, FORMS))}")

    def bind(self, pattern: Pattern) -> Pattern:
        if not pattern.pair:
            raise wrong_arrow(pattern, self)
        return pattern

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """Each side is a sample of its own, with a learned token at its end; without answers one side may be missing."""
        if sample.begin is not None:
            raise sample.pattern.writes_nothing()
        sides: list[LaidOut] = []
        prints: list[int] = []
        for side, fields in enumerate(sample.pattern.sides.values()):
            segments = sample.read(fields)
            if not segments and not sample.learn and side == len(sides):
                continue
            if not segments:
                raise StreamError(
                    f"every field of the side {' '.join(f.name for f in fields)!r} is None; give at least one"
                )
            read = tokens_of(segments)
            prints.append(fingerprint(s.tokens for s in segments))
            query = Tokens(torch.tensor([side]), at_times(torch.zeros(1)))
            segments.append(Segment(sample.start.kind, query, (1.0, 1.0, 1.0), False))
            sides.append(LaidOut(segments, read, read, read + 1, side=side))
        if sample.learn:
            sides[0].target = torch.tensor([prints])
        return sides

    def vocab(self, tokenizer: Tokenizer) -> int:
        return self.width

    def readout(self, width: int, tokenizer: Tokenizer) -> "ContrastReadout":
        return ContrastReadout(width, self.width, self.form)

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], left: int | None = None) -> Tensor:
        """Unit vectors (N, F): the first `left` rows (None: half of them) are left sides, the others right ones."""
        assert isinstance(readout, ContrastReadout)
        left = len(state_ND) // 2 if left is None else left
        return torch.cat([readout.vectors(state_ND[:left], "left"), readout.vectors(state_ND[left:], "right")])

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        raise ConfigError("Contrast: its loss needs the learned scale as well; use state_loss")

    def state_loss(
        self,
        readout: Readout,
        state_ND: Tensor,
        lengths: Sequence[int],
        target: Tensor,
        target_lengths: Sequence[int],
        left: int | None = None,
    ) -> Tensor:
        """The loss of each pair in nats, summed over pairs; target: the fingerprints (pairs, 2) of left and right sides."""
        pairs = len(target)
        if len(state_ND) != 2 * pairs or left not in (None, pairs):
            raise StreamError(
                f"Contrast: {len(state_ND)} rows, {left} of them left, for {pairs} pairs; each pair needs two"
            )
        assert isinstance(readout, ContrastReadout)
        left_NF, right_NF = self.logits(readout, state_ND, lengths).split(pairs)
        same_NN = (target[:, None] == target[None]).any(-1)
        return self.pair_loss(readout.scores(left_NF, right_NF), same_NN)

    def pair_loss(self, score_NM: Tensor, same_NM: Tensor) -> Tensor:
        """The loss summed over pairs, which are the diagonal of the scores; others that are the `same` are no negatives."""
        own = torch.eye(len(score_NM), dtype=torch.bool, device=score_NM.device)
        if self.form == "sigmoid":
            nll_NM = -F.logsigmoid(torch.where(own, score_NM, -score_NM))
            return nll_NM.masked_fill(same_NM & ~own, 0.0).sum()
        score_NM = score_NM.masked_fill(same_NM & ~own, -torch.inf)
        found = score_NM.diagonal()
        return (score_NM.logsumexp(1) - found + score_NM.logsumexp(0) - found).sum() / 2

    def probability(self, score_NM: Tensor) -> Tensor:
        """The probability that each left matches each right (N, M): a row sums to 1 (softmax), or each has its own (sigmoid)."""
        return score_NM.softmax(1) if self.form == "softmax" else score_NM.sigmoid()

    def inputs(self, reading: Reading, state_TD: Tensor) -> dict[str, Any]:
        return {"left": reading.left}

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("Contrast: a pair has no answer; use Model.vectors or Model.matches")


class ContrastReadout(Readout):
    """A learned token and a linear map for each side, the scale, and the bias of the sigmoid form."""

    def __init__(self, width: int, vector: int, form: str) -> None:
        super().__init__(width, 1, 2)
        del self.linear  # the maps of both sides replace it
        self.left, self.right = (nn.Linear(width, vector, bias=False) for _ in range(2))
        for linear in (self.left, self.right):
            nn.init.normal_(linear.weight, std=width**-0.5)
        self.largest = LARGEST_SCALE if form == "softmax" else math.inf
        # single numbers have an axis, because FSDP2 cannot shard a scalar
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07 if form == "softmax" else 10.0)))
        self.bias = nn.Parameter(torch.full((1,), -10.0)) if form == "sigmoid" else None

    def vectors(self, state_ND: Tensor, side: str) -> Tensor:
        """Unit vectors (N, F) of states (N, D) of one side, "left" or "right"."""
        vector_NF = (self.left if side == "left" else self.right)(state_ND)
        return F.normalize(vector_NF.to(torch.promote_types(vector_NF.dtype, torch.float32)), dim=-1)

    def scores(self, left_NF: Tensor, right_MF: Tensor) -> Tensor:
        """The scores (N, M) of each left with each right, which are the logits of the loss."""
        check_shapes("Contrast", left_NF=left_NF, right_MF=right_MF)
        # bfloat16 rounds a score of 100 by up to a quarter of a nat
        with torch.autocast(left_NF.device.type, enabled=False):
            score_NM = left_NF @ right_MF.T * self.log_scale.to(left_NF.dtype).exp().clamp(max=self.largest)
        return score_NM if self.bias is None else score_NM + self.bias


def fingerprint(values: Iterable[Tokens]) -> int:
    """A hash of 64 bits of a side's tokens, by which equal sides are recognised across data workers."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in values:
        for part in (tokens.content, tokens.position_NA):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
