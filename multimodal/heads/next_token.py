"""An autoregressive head: language models, captions, codes of images and sounds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import (
    EncodedSample,
    Head,
    LaidOut,
    Prediction,
    Readout,
    Segment,
    check_length,
    check_smoothing,
    computes_as,
    tied_linear,
    tokens_of,
    vocabulary,
)
from multimodal.heads.cross_entropy import linear_cross_entropy
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens, written_tokens


@dataclass(frozen=True)
class NextToken(Head):
    """Writes token after token, from a start to a stop.

    By default the start is a learned token, and logits have V + 1 classes, of which the last is the stop.

    label_smoothing: the share of the target that is spread evenly over all tokens, from 0 to below 1.
    start_ids: ids of the vocabulary from which an answer starts, instead of a learned token; () starts from the last token read.
    stop_id: the id of the vocabulary that ends an answer; None: a class of its own.
    tied: whether logits are products with the embedded tokens, so that this head has no matrix of its own (Press & Wolf 2017).
    bias: whether the logits have a learned bias.
    scale: factor of the states.
    cap: bound of the logits, which become cap * tanh(logits / cap); None: no bound.
    never: ids that are never written, such as marks that are only read; logits and loss know nothing of it.
    never_first: ids that do not begin an answer.
    """

    label_smoothing: float = 0.0
    start_ids: tuple[int, ...] | None = None
    stop_id: int | None = None
    tied: bool = False
    bias: bool = True
    scale: float = 1.0
    cap: float | None = None
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    autoregressive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_smoothing(self)
        if self.cap is not None and not self.cap > 0:
            raise ConfigError(f"NextToken: cap={self.cap} must be above 0, or None")
        if self.tied and self.stop_id is None:
            raise ConfigError("NextToken: tied=True has one logit for each token; give the stop_id among them")

    @property
    def queries(self) -> int:
        """Number of learned tokens."""
        return 1 if self.start_ids is None else 0

    def bind(self, pattern: Pattern) -> Pattern:
        if self.start_ids == () and not pattern.reads and not pattern.pair:
            raise TaskError(
                f"task {pattern.text!r} reads nothing, so NextToken needs a start; leave start_ids out, or name one"
            )
        return pattern if not pattern.reads and not pattern.pair else super().bind(pattern)

    def start(self, key: str, kind: str, tokenizer: Tokenizer) -> Segment:
        if self.start_ids is None:
            return super().start(key, kind, tokenizer)
        ids = torch.tensor(self.start_ids, dtype=torch.long)
        return Segment(kind, written_tokens(tokenizer, ids), tokenizer.step, False, axes=tokenizer.axes)

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        (part,) = super().lay_out(sample)
        # each written token is read from the one before it: the last of the start, or without a start the last one read
        first = part.read + len(sample.start.tokens) - 1
        if first < 0:
            raise StreamError("there is nothing to start from: every field that is read is None, and start_ids is ()")
        return [dataclasses.replace(part, first=first, last=tokens_of(part.segments))]

    def stop(self, tokenizer: Tokenizer) -> int:
        return self.vocab(tokenizer) - 1 if self.stop_id is None else self.stop_id

    def tie(self, readout: Readout, embedding: nn.Module) -> None:
        if self.tied:
            readout.linear = tied_linear(self, embedding)

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        if self.tied:  # a table of the vocabulary's size would be made in vain
            return Readout(width, 1, self.queries, self.bias)
        return Readout(width, self.vocab(tokenizer), self.queries, self.bias)

    def vocab(self, tokenizer: Tokenizer) -> int:
        symbols = vocabulary(self, tokenizer)
        try:  # tokenizers raise a ConfigError if they have no positions for written tokens
            tokenizer.places(1)
        except ConfigError as error:
            raise ConfigError(f"NextToken cannot write {type(tokenizer).__name__}: {error}") from error
        for name, ids in (
            ("stop_id", [] if self.stop_id is None else [self.stop_id]),
            ("start_ids", self.start_ids or ()),
            ("never", self.never),
            ("never_first", self.never_first),
        ):
            # a stop of its own may be forbidden too
            count = symbols + (self.stop_id is None and name.startswith("never"))
            if any(not 0 <= i < count for i in ids):
                raise ConfigError(f"NextToken: {name}={getattr(self, name)} is not among the ids 0 to {count - 1}")
        return symbols + (self.stop_id is None)

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        logits = readout.linear(state_ND if self.scale == 1.0 else state_ND * self.scale)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def forbidden(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.never, self.never_first

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        check_length(self, tokens, tokenizer)
        return F.pad(tokens.content, (0, 1), value=self.stop(tokenizer))

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="sum")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        if self.cap is not None or not computes_as(self, NextToken):
            return super().state_loss(readout, state_ND, lengths, target, target_lengths)
        return linear_cross_entropy(
            readout.linear, state_ND if self.scale == 1.0 else state_ND * self.scale, target, self.label_smoothing
        )

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("NextToken: an answer is written step by step; use Model.generate")
