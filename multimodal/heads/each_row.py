"""A head with an answer for each row of the context: sequence labelling, copying tasks, few-shot episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import Head, Prediction, Readout, class_count, ranges, tied_linear
from multimodal.heads.pool import First, Transformed
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokenizer, Tokens, at_times, written_tokens


@final
@dataclass(frozen=True)
class EachRow(Head):
    """An answer for each row of the context: a class if the kind has ids, independent bits if it has features of 0 and 1.

    An answer of n tokens is for the last n rows of the context, in order.

    last: number of rows that are answered; None: all of the context in prediction, and as many as targets in training.
    transform: a norm, a dense layer or both, through which each state goes first, as Transformed(First(), ..); None: none.
    tied: whether logits are products with the embedded tokens, so that this head has no matrix of its own (Press & Wolf 2017).
    bias: whether the logits have a learned bias.
    """

    last: int | None = None
    transform: Transformed | None = None
    tied: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if self.transform is not None and self.transform.of != First():
            raise ConfigError(
                f"EachRow: transform={self.transform!r} pools rows, but each has an answer; make it Transformed(First(), ..)"
            )
        if self.last is not None and self.last < 1:
            raise ConfigError(f"EachRow: last={self.last} answers nothing; use 1 or more, or None for every row")

    def vocab(self, tokenizer: Tokenizer) -> int:
        return class_count(self, tokenizer)

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        if len(tokens) > rows:
            raise StreamError(
                f"EachRow: the answer has {len(tokens)} tokens, but the context only {rows} rows to answer in"
            )
        if self.last not in (None, len(tokens)):
            raise StreamError(f"EachRow: the answer has {len(tokens)} tokens, but last={self.last} rows are answered")
        if tokens.content.is_floating_point() and not ((tokens.content >= 0) & (tokens.content <= 1)).all():
            raise StreamError(
                f"EachRow: {type(tokenizer).__name__} gave features outside 0 to 1, but features are answered as bits"
            )
        return tokens.content

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.transform is not None:
            state_ND = self.transform.pool(state_ND, [1] * len(state_ND), readout.pool)
        return readout.linear(state_ND)

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        # a table of the vocabulary's size would be made in vain if it is tied
        readout = Readout(width, 1 if self.tied else self.vocab(tokenizer), 0, self.bias)
        readout.pool = None if self.transform is None else self.transform.weights(width)
        return readout

    def tie(self, readout: Readout, embedding: nn.Module) -> None:
        if self.tied:
            readout.linear = tied_linear(self, embedding)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        answered = logits[last_rows(lengths, target_lengths).to(logits.device, non_blocking=True)].float()
        if target.is_floating_point():  # the mean over bits is comparable with the loss of one class
            return F.binary_cross_entropy_with_logits(answered, target, reduction="none").mean(-1).sum()
        return F.cross_entropy(answered, target, reduction="sum")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        answers = []
        for rows in logits.float().cpu().split(list(lengths)):
            rows = rows if self.last is None else rows[-self.last :]
            if tokenizer.vocab_size is None:
                content, sure = (rows > 0).float(), F.logsigmoid(rows.abs()).sum()
            else:
                best, content = rows.log_softmax(-1).max(-1)
                sure = best.sum()
            if tokenizer.classes:
                first_NA = at_times(torch.zeros(1), tokenizer.axes)
                value = [tokenizer.decode(Tokens(row[None], first_NA)) for row in content]
            else:
                value = tokenizer.decode(written_tokens(tokenizer, content))
            answers.append(Prediction(value, float(sure.exp())))
        return answers


def last_rows(lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The last counts[i] rows of each sample i, for concatenated samples of these lengths."""
    count_B = torch.tensor(counts)
    return ranges(torch.tensor(lengths).cumsum(0) - count_B, count_B)
