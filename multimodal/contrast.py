"""A head that learns which two belong together: contrastive pairs across any two sides, "image <-> text".

left side,  its learned token --core--> state --left map---> unit vector --+
                                                                           +--> scale * cosine (+ bias), each left with each right
right side, its learned token --core--> state --right map--> unit vector --+
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads import Head, Prediction, Readout
from multimodal.shapes import ConfigError, StreamError, TaskError, check_shapes
from multimodal.surroundings import left_as_found
from multimodal.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from multimodal.model import Model

FORMS = ("softmax", "sigmoid")
LARGEST_SCALE = 100.0  # of the softmax form, as in section 2.5 of Radford et al.
BLOCK = 1024  # queries of a recall that are compared at once


@final
@dataclass(frozen=True)
class Contrast(Head):
    """Vectors of two sides that are close where they belong together; the others of the micro-batch are what they are told from.

    form: "softmax", which of all rights goes with this left and the other way round (CLIP, Radford et al. 2021, arXiv 2103.00020,
    figure 3; first scale 1 / 0.07), or "sigmoid", whether these two go together (SigLIP, Zhai et al. 2023, arXiv 2303.15343,
    algorithm 1; first scale 10 and bias -10).
    Two whose left sides, or whose right sides, have exactly the same tokens are not told from each other. The same photo under
    another crop is another side: where a photo has five captions, draw one of them each time the photo comes.
    width: F, numbers of a vector.
    """

    width: int = 256  # F, numbers of a vector
    form: str = "softmax"
    queries: ClassVar[int] = 2
    pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ConfigError(f"Contrast: width={self.width!r} must be a whole number, 1 or more")
        if self.form not in FORMS:
            raise ConfigError(f"Contrast: form={self.form!r} is neither {' nor '.join(map(repr, FORMS))}")

    def vocab(self, tokenizer: Tokenizer) -> int:
        return self.width

    def readout(self, width: int, tokenizer: Tokenizer) -> "ContrastReadout":
        return ContrastReadout(width, self.width, self.form)

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], left: int | None = None) -> Tensor:
        """Unit vectors (rows, F), of the `left` first rows (None: half of them) as left sides and of the others as right ones."""
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
        """Nats a pair, summed over the pairs; target (pairs, 2): what tells each left and each right side from others."""
        pairs = len(target)
        if len(state_ND) != 2 * pairs or left not in (None, pairs):
            raise StreamError(
                f"Contrast: {len(state_ND)} rows, {left} of them left, for {pairs} pairs; two each are wanted"
            )
        assert isinstance(readout, ContrastReadout)
        left_NF, right_NF = self.logits(readout, state_ND, lengths).split(pairs)
        same_NN = (target[:, None] == target[None]).any(-1)
        return self.pair_loss(readout.scores(left_NF, right_NF), same_NN)

    def pair_loss(self, score_NM: Tensor, same_NM: Tensor) -> Tensor:
        """The sum over pairs, which are the diagonal of the scores; whoever else is the `same` is left out."""
        own = torch.eye(len(score_NM), dtype=torch.bool, device=score_NM.device)
        if self.form == "sigmoid":
            nll_NM = -F.logsigmoid(torch.where(own, score_NM, -score_NM))
            return nll_NM.masked_fill(same_NM & ~own, 0.0).sum()
        score_NM = score_NM.masked_fill(same_NM & ~own, -torch.inf)
        found = score_NM.diagonal()
        return (score_NM.logsumexp(1) - found + score_NM.logsumexp(0) - found).sum() / 2

    def probability(self, score_NM: Tensor) -> Tensor:
        """Of each right for each left: all rights of a left share 1 (softmax), or each has its own (sigmoid)."""
        return score_NM.softmax(1) if self.form == "softmax" else score_NM.sigmoid()

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("Contrast: a pair has no answer; use Model.vectors or Model.matches")


class ContrastReadout(Readout):
    """The learned token that ends each side, a linear map for each, the scale, and the bias of the sigmoid form."""

    def __init__(self, width: int, vector: int, form: str) -> None:
        super().__init__(width, 1, 2)
        del self.linear  # in its place are those of the sides
        self.left, self.right = (nn.Linear(width, vector, bias=False) for _ in range(2))
        for linear in (self.left, self.right):
            nn.init.normal_(linear.weight, std=width**-0.5)
        self.largest = LARGEST_SCALE if form == "softmax" else math.inf
        # one number each, but with an axis: FSDP2 cannot share out a scalar
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07 if form == "softmax" else 10.0)))
        self.bias = nn.Parameter(torch.full((1,), -10.0)) if form == "sigmoid" else None

    def vectors(self, state_ND: Tensor, side: str) -> Tensor:
        """Unit vectors (N, F) of states that are all of one side."""
        vector_NF = (self.left if side == "left" else self.right)(state_ND)
        return F.normalize(vector_NF.to(torch.promote_types(vector_NF.dtype, torch.float32)), dim=-1)

    def scores(self, left_NF: Tensor, right_MF: Tensor) -> Tensor:
        """(N, M): how well each left goes with each right, on the scale of the loss."""
        check_shapes("Contrast", left_NF=left_NF, right_MF=right_MF)
        with torch.autocast(left_NF.device.type, enabled=False):  # bfloat16 knows a score of 100 to half a nat only
            score_NM = left_NF @ right_MF.T * self.log_scale.to(left_NF.dtype).exp().clamp(max=self.largest)
        return score_NM if self.bias is None else score_NM + self.bias


def fingerprint(values: Iterable[Tokens]) -> int:
    """A number of 64 bits that tells one side from another: of equal tokens it is equal."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in values:
        for part in (tokens.content, tokens.position_NA):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def side_vectors(model: "Model", task: str, parts: Iterable[Sequence[Mapping[str, Any]]], side: str | None) -> Tensor:
    """Unit vectors (N, F) of one side of each sample, which come in batches; the other side is not looked at."""
    model.packer.check_task(task)
    head, readout = _parts(model, task)
    sides = model.packer.patterns[task].sides
    names = {name: [field.name for field in fields] for name, fields in sides.items()}
    if side not in (None, *sides):
        raise ConfigError(f"task {task!r}: side={side!r} is neither 'left' nor 'right'")
    found, count, given = [torch.empty(0, head.width, device=model.device)], 0, set[str]()

    def chosen() -> str:
        if side is None and len(given) != 1:
            raise TaskError(
                f"task {task!r}: {'both sides' if given else 'no side'} came; give one, {' or '.join(names['left'])} "
                f"(left) or {' or '.join(names['right'])} (right), or say side='left' or side='right'"
            )
        return side or next(iter(given))

    with left_as_found(), model.resting():
        for part in parts:
            given |= {name for name in names if any(field in sample for sample in part for field in names[name])}
            own = names[chosen()]
            other = dict.fromkeys(name for names_of in names.values() for name in names_of if name not in own)
            stream = model.pack(task, [{**sample, **other} for sample in part], answers=False, first=count)
            found.append(readout.vectors(model(stream)[stream.readings[task].row_N], chosen()))
            count += len(part)
    chosen()  # of no samples at all
    return torch.cat(found)


def matches(model: "Model", task: str, left_NF: Tensor, right_MF: Tensor) -> Tensor:
    """(N, M): the probabilities of a pair's head."""
    head, readout = _parts(model, task)
    with torch.no_grad():
        return head.probability(readout.scores(left_NF, right_MF))


def _parts(model: "Model", task: str) -> tuple[Contrast, ContrastReadout]:
    """Both halves of a pair's head.

    Raises:
        TaskError: no pair.
    """
    head, readout = model.packer.head(task), model.readout(task)
    if not isinstance(head, Contrast) or not isinstance(readout, ContrastReadout):
        raise TaskError(f"task {task!r} is no pair; a pair has two sides, as in 'image <-> text'")
    return head, readout


def evaluate_pairs(model: "Model", task: str, samples: Any, *, batch: int = 64) -> dict[str, float]:
    """Mean loss of a pair in nats, told from the others of its batch, and recall at 1 and 10 among all samples, both ways.

    "R@10 right" is the share of left sides that have a right side of theirs among their 10 nearest. Sides that occur more than once
    count once: a photo with five captions is one photo, and any of the five is right.
    """
    head, readout = _parts(model, task)
    total, vectors, targets = 0.0, [], []
    with model.resting():
        for start in range(0, len(samples), batch):
            part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
            stream = model.pack(task, part, first=start)
            r = stream.readings[task]
            assert r.target is not None
            state_ND = model(stream)[r.row_N]
            total += float(head.state_loss(readout, state_ND, r.lengths, r.target, r.target_lengths))
            vectors.append(head.logits(readout, state_ND, r.lengths).split(len(part)))
            targets.append(r.target)
    left_NF, right_NF = (torch.cat(side) for side in zip(*vectors, strict=True))
    return {"loss": total / len(samples), **recalls(left_NF, right_NF, torch.cat(targets))}


def recalls(left_NF: Tensor, right_NF: Tensor, target: Tensor, at: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Recall both ways of pairs (N, F) and (N, F); target (N, 2): equal numbers are equal sides. A tie counts against it."""
    sides, places = [], []
    for vector_NF, number_N in zip((left_NF, right_NF), target.T, strict=True):
        unique, place_N = number_N.unique(return_inverse=True)
        sides.append(vector_NF.new_empty(len(unique), vector_NF.shape[1]).index_copy(0, place_N, vector_NF))
        places.append(place_N)
    fits = torch.zeros(len(sides[0]), len(sides[1]), dtype=torch.bool, device=left_NF.device)
    fits[places[0], places[1]] = True
    right, left = _ranks(sides[0], sides[1], fits), _ranks(sides[1], sides[0], fits.T)
    return {
        f"R@{k} {name}": float((rank_N < k).double().mean())
        for name, rank_N in (("right", right), ("left", left))
        for k in at
    }


def _ranks(query_NF: Tensor, key_MF: Tensor, fits_NM: Tensor) -> Tensor:
    """How many keys that do not fit come before the first that does, for each query: (N,)."""
    ranks = []
    for q_NF, fit_NM in zip(query_NF.split(BLOCK), fits_NM.split(BLOCK), strict=True):
        score_NM = q_NF @ key_MF.T
        best = score_NM.masked_fill(~fit_NM, -torch.inf).amax(1, keepdim=True)
        ranks.append(((score_NM >= best) & ~fit_NM).sum(1))
    return torch.cat(ranks)
