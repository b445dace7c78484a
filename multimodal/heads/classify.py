"""A head that answers with one class, or with a set of classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.heads.base import Prediction, Readout, check_smoothing, class_count, computes_as
from multimodal.heads.cross_entropy import linear_cross_entropy
from multimodal.heads.pool import Pool
from multimodal.heads.pooled import Pooled
from multimodal.shapes import ConfigError, StreamError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, at_times


@dataclass(frozen=True)
class Classify(Pooled):
    """One class; or a set of classes, if the tokenizer has a feature of 0 or 1 for each class.

    The answer is computed from a learned token that attends to the whole context, or from a pool of the context's states.

    label_smoothing: the share of the target that is spread evenly over all classes, from 0 to below 1 (Szegedy et al. 2016).
    class_weights: by class, in the order of the kind, the weight of its targets in the loss, which is divided by the sum of the
        weights and not by the number of the targets, as PyTorch's `CrossEntropyLoss(weight=..)` does; (): all weigh 1. Held-out
        losses are weighed too. `mm.data.class_weights` makes them from the samples.
    pool: how the states of the context become one vector, such as `First()` or `Mean()`; None: a learned token reads them.
    """

    label_smoothing: float = 0.0
    pool: Pool | None = None
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_smoothing(self)
        self.check_pool()
        given = self.class_weights
        if not isinstance(given, tuple) or not all(type(w) in (int, float) and 0 < w < math.inf for w in given):
            raise ConfigError(
                f"Classify: class_weights={shortened(repr(given), 200)} must be a tuple of numbers above 0, one for each class"
            )

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        if not len(tokens):
            raise StreamError(
                "Classify: the answer is empty, but a class is one token; name one, or leave this sample out"
            )
        if len(tokens) != 1:
            raise StreamError(
                f"Classify: the answer has {len(tokens)} tokens, but a class is one; NextToken writes more than one"
            )
        return tokens.content

    def vocab(self, tokenizer: Tokenizer) -> int:
        count = class_count(self, tokenizer)
        if self.class_weights and tokenizer.vocab_size is None:
            raise ConfigError(
                f"Classify: class_weights weigh one class of a sample, and {type(tokenizer).__name__} writes a set of classes; "
                "leave them out"
            )
        if self.class_weights and len(self.class_weights) != count:
            raise ConfigError(
                f"Classify: {len(self.class_weights)} class_weights were given for {count} classes of {type(tokenizer).__name__}; "
                "give one for each"
            )
        return count

    def _weight(self, like: Tensor) -> Tensor | None:
        """The weight of each class (V,), beside these logits."""
        return torch.tensor(self.class_weights, dtype=torch.float32, device=like.device) if self.class_weights else None

    def divisor(self, target: Tensor, target_lengths: Sequence[int]) -> float:
        if not self.class_weights:
            return super().divisor(target, target_lengths)
        return float(torch.tensor(self.class_weights, dtype=torch.float64)[target.cpu()].sum())

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(self._pooled(readout, state_ND, lengths))

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        if target.is_floating_point():  # multi-hot: the mean over classes is comparable with the loss of one class
            return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(-1).sum()
        weight = self._weight(logits)
        return F.cross_entropy(logits.float(), target, weight, label_smoothing=self.label_smoothing, reduction="sum")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        if target.is_floating_point() or self.class_weights or not computes_as(self, Classify):
            return super().state_loss(readout, state_ND, lengths, target, target_lengths)
        vector_BD = self._pooled(readout, state_ND, lengths)
        return linear_cross_entropy(readout.linear, vector_BD, target, self.label_smoothing)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(-1)
        weight = self._weight(logits)
        return F.cross_entropy(logits.float(), target, weight, label_smoothing=self.label_smoothing, reduction="none")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        several = tokenizer.vocab_size is None  # features of 0 and 1, which are independent decisions
        probability = logits.float().sigmoid() if several else logits.float().softmax(-1)
        names = class_names(tokenizer)
        answers = []
        for row in probability.tolist():
            by_name = dict(sorted(zip(names, row, strict=True), key=lambda item: -item[1]))
            if several:
                chosen = [name for name, p in zip(names, row, strict=True) if p >= 0.5]  # in the order of decode
                sure = min(max(p, 1 - p) for p in row)  # the confidence of the least certain decision
                answers.append(Prediction(chosen, sure, by_name))
            else:
                best = next(iter(by_name))
                answers.append(Prediction(best, by_name[best], by_name))
        return answers


def class_names(tokenizer: Tokenizer) -> list[Any]:
    """The name of each class, in the order of the logits."""
    if tokenizer.vocab_size is None:  # features of 0 and 1, of which all are 1
        every = torch.ones(1, tokenizer.feature_size or 0)
        return tokenizer.decode(Tokens(every, at_times(torch.zeros(1), tokenizer.axes)))
    return [tokenizer.decode(one_class(c, tokenizer)) for c in range(tokenizer.vocab_size)]


def one_class(c: int, tokenizer: Tokenizer) -> Tokens:
    """The tokens that stand for class c alone."""
    first_NA = at_times(torch.zeros(1), tokenizer.axes)
    if tokenizer.vocab_size is not None:
        return Tokens(torch.tensor([c]), first_NA)
    assert tokenizer.feature_size is not None
    return Tokens(F.one_hot(torch.tensor([c]), tokenizer.feature_size).float(), first_NA)
