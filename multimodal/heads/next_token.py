"""An autoregressive head: language models, captions, codes of images and sounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from multimodal.heads.base import (
    Head,
    Prediction,
    Readout,
    check_length,
    check_smoothing,
    computes_as,
    vocabulary,
)
from multimodal.heads.cross_entropy import linear_cross_entropy
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class NextToken(Head):
    """Writes token after token, from a learned start to a stop; logits have V + 1 classes, of which the last is the stop.

    label_smoothing: the share of the target that is spread evenly over all tokens, from 0 to below 1.
    """

    label_smoothing: float = 0.0
    queries: ClassVar[int] = 1
    autoregressive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_smoothing(self)

    def vocab(self, tokenizer: Tokenizer) -> int:
        symbols = vocabulary(self, tokenizer)
        try:  # tokenizers raise a ConfigError if they have no positions for written tokens
            tokenizer.places(1)
        except ConfigError as error:
            raise ConfigError(f"NextToken cannot write {type(tokenizer).__name__}: {error}") from error
        return symbols + 1

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(state_ND)

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        check_length(self, tokens, tokenizer)
        return F.pad(tokens.content, (0, 1), value=self.vocab(tokenizer) - 1)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="sum")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        if not computes_as(self, NextToken):
            return super().state_loss(readout, state_ND, lengths, target, target_lengths)
        return linear_cross_entropy(readout.linear, state_ND, target, self.label_smoothing)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("NextToken: an answer is written step by step; use Model.generate")
