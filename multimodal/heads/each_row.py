"""A head that answers row by row: labels of a sequence, the copy on a tape, the queries of an episode."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.heads.base import Head, Prediction, Readout
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokenizer, Tokens


@final
@dataclass(frozen=True)
class EachRow(Head):
    """An answer for each row of the context: a class where the kind is ids, independent bits where it is features of 0 and 1.

    An answer of n tokens belongs to the context's last n rows, in order. last: how many rows are answered at test; None: all.
    """

    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError(f"EachRow: last={self.last} answers nothing; use 1 or more, or None for every row")

    def vocab(self, tokenizer: Tokenizer) -> int:
        classes = tokenizer.vocab_size or tokenizer.feature_size
        if not classes:
            raise ConfigError(
                f"EachRow: {type(tokenizer).__name__} declares no vocab_size or feature_size to choose from"
            )
        return classes

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
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        answered = logits[last_rows(lengths, target_lengths).to(logits.device, non_blocking=True)].float()
        if target.is_floating_point():  # mean over bits, so that its size is that of a single decision
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
                value = [tokenizer.decode(Tokens(row[None], torch.zeros(1, 3))) for row in content]
            else:
                value = tokenizer.decode(Tokens(content, tokenizer.places(len(content))))
            answers.append(Prediction(value, float(sure.exp())))
        return answers


def last_rows(lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The last counts[i] rows of each sample i, for samples of these lengths end to end."""
    ends, counted = torch.tensor(lengths).cumsum(0), torch.tensor(counts)
    within = torch.arange(int(counted.sum())) - (counted.cumsum(0) - counted).repeat_interleave(counted)
    return (ends - counted).repeat_interleave(counted) + within
