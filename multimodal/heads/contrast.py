"""A head for contrastive learning of pairs such as "image <-> text".

left side,  its learned token --core--> state --left map---> unit vector --+
                                                                           +--> scale * cosine (+ bias), each left with each right
right side, its learned token --core--> state --right map--> unit vector --+

With a pool there are no learned tokens, and the states of each side become one vector by it.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import check_part
from multimodal.heads.base import (
    EncodedSample,
    GatherRows,
    Head,
    LaidOut,
    Prediction,
    Reading,
    Readout,
    Segment,
    tokens_of,
    wrong_arrow,
)
from multimodal.heads.pool import Pool
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, StreamError, check_shapes, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times

FORMS = ("softmax", "sigmoid")
SIDES = ("left", "right")
LARGEST_SCALE = 100.0  # of the softmax form, as in section 2.5 of Radford et al.


@final
@dataclass(frozen=True)
class Contrast(Head):
    """Learns vectors of two sides that are close if the sides match; the other pairs of the micro-batch are the negatives.

    Of several processes that train together with a `batch`, they are those of all; with a token budget those of the same pack.

    Two pairs whose left sides, or whose right sides, have exactly the same tokens are no negatives of each other. Another crop of
    the same photo is another side: if a photo has five captions, draw one of them each time the photo comes.

    width: F, size of a vector.
    form: "softmax" classifies which right side matches a left one among all, and vice versa (CLIP, Radford et al. 2021, arXiv
        2103.00020, figure 3; initial scale 1 / 0.07). "sigmoid" decides for each two whether they match (SigLIP, Zhai et al. 2023,
        arXiv 2303.15343, algorithm 1; initial scale 10 and bias -10).
    pool: how the states of a side become one vector, such as `Mean()`: one pool, whose weights both sides share, or one for each;
        None: a learned token reads them.
    maps: the sides that have a linear map from there to `width`; without one the vector itself has this width.
    bias: the sides whose map has a bias.

    Examples:
        >>> task = mm.Task("image <-> text", mm.Contrast(form="sigmoid", width=64))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1), "text": TextBytes()}, mm.Core.tiny(), [task])
        >>> tuple(model.matches("image <-> text", [{"image": square}], [{"text": "square"}, {"text": "circle"}]).shape)
        (1, 2)
    """

    width: int = 256
    form: str = "softmax"
    pool: Pool | tuple[Pool, Pool] | None = None
    maps: tuple[str, ...] = SIDES
    bias: tuple[str, ...] = ()
    measures: ClassVar[tuple[str, ...]] = ("loss", "R@1 right", "R@10 right", "R@1 left", "R@10 left")
    smallest_batch: ClassVar[int] = 2  # the other pair is the negative
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("Contrast", least=1, width=self.width)
        if self.form not in FORMS:
            raise ConfigError(f"Contrast: form={self.form!r} is neither {' nor '.join(map(repr, FORMS))}")
        if isinstance(self.pool, tuple) and len(self.pool) != 2:
            raise ConfigError(
                f"Contrast: pool has {len(self.pool)} pools; give one for both sides, or one for each of the two"
            )
        for pool in self.pools or ():
            check_part("Contrast: pool", pool, Pool, "Mean()")
        for name, known in (("maps", SIDES), ("bias", self.maps)):
            if set(getattr(self, name)) - set(known):
                raise ConfigError(f"Contrast: {name}={getattr(self, name)!r} has a side that is not among {known!r}")

    @property
    def queries(self) -> int:
        """Number of learned tokens."""
        return 2 if self.pool is None else 0

    @property
    def pools(self) -> tuple[Pool, Pool] | None:
        """The pools of the left and of the right side."""
        return (self.pool, self.pool) if isinstance(self.pool, Pool) else self.pool

    def bind(self, pattern: Pattern) -> Pattern:
        if not pattern.pair:
            raise wrong_arrow(pattern, self)
        return pattern

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """Each side is a sample of its own, with a learned token or a pool at its end; without answers one side may be missing."""
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
            if self.pools is not None:
                first, last = self.pools[side].rows(read)
                sides.append(LaidOut(segments, read, first, last, side=side))
                continue
            query = Tokens(torch.tensor([side]), at_times(torch.zeros(1)))
            segments.append(Segment(sample.start.kind, query, (1.0, 1.0, 1.0), False))
            sides.append(LaidOut(segments, read, read, read + 1, side=side))
        if sample.learn:
            sides[0].target = torch.tensor([prints])
        return sides

    def vocab(self, tokenizer: Tokenizer) -> int:
        return self.width

    def readout(self, width: int, tokenizer: Tokenizer) -> "ContrastReadout":
        return ContrastReadout(self, width)

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], left: int | None = None) -> Tensor:
        """Unit vectors (N, F): those of the first `left` samples (None: half of them) are left sides, the others right ones."""
        assert isinstance(readout, ContrastReadout)
        left = len(lengths) // 2 if left is None else left
        rows = sum(lengths[:left])
        left_NF = readout.vectors(state_ND[:rows], "left", lengths[:left])
        return torch.cat([left_NF, readout.vectors(state_ND[rows:], "right", lengths[left:])])

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
        gather: GatherRows | None = None,
    ) -> Tensor:
        """The loss of each pair in nats, summed over pairs; target: the fingerprints (pairs, 2) of left and right sides.

        gather: adds the pairs of other processes, as negatives; None: there are none.
        """
        pairs = len(target)
        if len(lengths) != 2 * pairs or left not in (None, pairs):
            raise StreamError(
                f"Contrast: {len(lengths)} sides, {left} of them left, for {pairs} pairs; each pair needs two"
            )
        assert isinstance(readout, ContrastReadout)
        left_NF, right_NF = self.logits(readout, state_ND, lengths).split(pairs)
        if gather is None:
            same_NN = (target[:, None] == target[None]).any(-1)
            score_NN = readout.scores(left_NF, right_NF)
            return self.pair_loss(score_NN, score_NN.T, same_NN)
        both_MF, all_target, first = gather(torch.cat([left_NF, right_NF], -1), target)
        left_MF, right_MF = both_MF.split(self.width, -1)
        same_NM = (target[:, None] == all_target[None]).any(-1)
        rights_NM = readout.scores(left_NF, right_MF)
        lefts_NM = rights_NM if self.form == "sigmoid" else readout.scores(left_MF, right_NF).T
        return self.pair_loss(rights_NM, lefts_NM, same_NM, first)

    def absent_loss(self, state_TD: Tensor, gather: GatherRows) -> Tensor:
        dtype = torch.promote_types(state_TD.dtype, torch.float32)  # that of the vectors of the others
        none_NF = state_TD.new_zeros(0, 2 * self.width, dtype=dtype)
        both_MF, _, _ = gather(none_NF, torch.zeros(0, 2, dtype=torch.long, device=state_TD.device))
        return both_MF[:0].sum()  # 0, but in the backward pass it takes part as well

    def pair_loss(self, rights_NM: Tensor, lefts_NM: Tensor, same_NM: Tensor, first: int = 0) -> Tensor:
        """The loss summed over N pairs; others that are the `same` are no negatives.

        rights_NM: the scores of their left sides with the right sides of all pairs. lefts_NM: those of their right sides with all
        left sides. first: the number of the first of the N among all.
        """
        own = torch.zeros_like(same_NM)
        own[:, first : first + len(own)].fill_diagonal_(True)
        if self.form == "sigmoid":  # each two sides are decided once
            nll_NM = -F.logsigmoid(torch.where(own, rights_NM, -rights_NM))
            return nll_NM.masked_fill(same_NM & ~own, 0.0).sum()
        rights_NM, lefts_NM = (x.masked_fill(same_NM & ~own, -torch.inf) for x in (rights_NM, lefts_NM))
        found = rights_NM[own]
        return (rights_NM.logsumexp(1) - found + lefts_NM.logsumexp(1) - found).sum() / 2

    def probability(self, score_NM: Tensor) -> Tensor:
        """The probability that each left matches each right (N, M): a row sums to 1 (softmax), or each has its own (sigmoid)."""
        return score_NM.softmax(1) if self.form == "softmax" else score_NM.sigmoid()

    def inputs(self, reading: Reading, state_TD: Tensor) -> dict[str, Any]:
        return {"left": reading.left}

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("Contrast: a pair has no answer; use Model.vectors or Model.matches")


class ContrastReadout(Readout):
    """A learned token or a pool and a linear map for each side, the scale, and the bias of the sigmoid form."""

    left: nn.Module
    right: nn.Module

    def __init__(self, head: Contrast, width: int) -> None:
        super().__init__(width, 1, head.queries)
        del self.linear  # the maps of both sides replace it
        self.pools: dict[str, Pool | None] = dict(zip(SIDES, head.pools or (None, None), strict=True))
        if isinstance(head.pool, Pool):
            self.pool = head.pool.weights(width)
        elif head.pool is not None:
            own = zip(SIDES, head.pool, strict=True)
            self.pool = nn.ModuleDict({side: pool.weights(width) or nn.Identity() for side, pool in own})
        for side, pool in self.pools.items():
            setattr(self, side, _map(head, side, width if pool is None else pool.width(width)))
        self.largest = LARGEST_SCALE if head.form == "softmax" else math.inf
        # single numbers have an axis, because FSDP2 cannot shard a scalar
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07 if head.form == "softmax" else 10.0)))
        self.bias = nn.Parameter(torch.full((1,), -10.0)) if head.form == "sigmoid" else None

    def last_layers(self) -> list[nn.Module]:
        return [self.left, self.right]

    def pool_of(self, side: str) -> tuple[Pool | None, nn.Module | None]:
        """The pool of a side and its learned parameters; None: a learned token reads the side."""
        return self.pools[side], self.pool[side] if isinstance(self.pool, nn.ModuleDict) else self.pool

    def vectors(self, state_ND: Tensor, side: str, lengths: Sequence[int] | None = None) -> Tensor:
        """Unit vectors (B, F) of one side, "left" or "right", from the rows (N, D) that the head reads of it.

        lengths: by sample, the number of its rows; None: one each.
        """
        pool, weights = self.pool_of(side)
        lengths = [1] * len(state_ND) if lengths is None else lengths
        if pool is not None and len(lengths):
            state_ND = pool.pool(state_ND, lengths, weights)
        return self.mapped(state_ND, side)

    def mapped(self, vector_BD: Tensor, side: str) -> Tensor:
        """Unit vectors (B, F) of one side, from one vector of each sample."""
        vector_BF = getattr(self, side)(vector_BD)
        return F.normalize(vector_BF.to(torch.promote_types(vector_BF.dtype, torch.float32)), dim=-1)

    def scores(self, left_NF: Tensor, right_MF: Tensor) -> Tensor:
        """The scores (N, M) of each left with each right, which are the logits of the loss."""
        check_shapes("Contrast", left_NF=left_NF, right_MF=right_MF)
        # bfloat16 rounds a score of 100 by up to a quarter of a nat
        with torch.autocast(left_NF.device.type, enabled=False):
            score_NM = left_NF @ right_MF.T * self.log_scale.to(left_NF.dtype).exp().clamp(max=self.largest)
        return score_NM if self.bias is None else score_NM + self.bias


def _map(head: Contrast, side: str, width: int) -> nn.Module:
    """The map of one side, from vectors of this width.

    Raises:
        ConfigError: there is none, and its vectors have another width than those of the head.
    """
    if side not in head.maps:
        if width != head.width:
            raise ConfigError(
                f"Contrast: the {side} side has no map, so width={head.width} must be that of its vector, {width}"
            )
        return nn.Identity()
    linear = nn.Linear(width, head.width, bias=side in head.bias)
    nn.init.normal_(linear.weight, std=width**-0.5)
    if side in head.bias:
        nn.init.zeros_(linear.bias)
    return linear


def fingerprint(values: Iterable[Tokens]) -> int:
    """A hash of 64 bits of a side's tokens, by which equal sides are recognised across data workers."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in values:
        for part in (tokens.content, tokens.position_NA, *(() if tokens.pairs is None else (tokens.pairs,))):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
