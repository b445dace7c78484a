"""Heads read the answer off the stream's states: two verbs, `logits` and `loss`, and `answer` for people."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class Prediction:
    """An answer, how sure the head is of it, and every class's probability where there are classes.

    Probabilities are the model's own, as it was trained, and not calibrated: with `label_smoothing=s` over V classes a model is
    taught to give its answer 1 - s + s / V at most (91 % of ten classes with 0.1), however sure it could be.

    value: the answer, as the kind's `decode` gives it.
    confidence: the probability that the head gives its answer, from 0 to 1.
    probability: the probability of each class by its name; empty where there are no classes.
    ended: what ended the writing: stop, stop string, length (this kind has a fixed one), or max_tokens.
    tokens: what was written, as tokens; None where an answer was given at once.
    others: of a beam search, the answers from the second best on.
    """

    value: Any
    confidence: float
    probability: dict[str, float] = field(default_factory=dict, repr=False)
    ended: str = "stop"  # what ended the writing: stop, stop string, length (this kind has a fixed one), max_tokens
    tokens: Tokens | None = field(default=None, repr=False, compare=False)  # what was written
    others: "tuple[Prediction, ...]" = field(default=(), repr=False)  # from the second best on, of a beam search

    @property
    def complete(self) -> bool:
        """False: writing was ended by max_tokens before the head chose to stop."""
        return self.ended != "max_tokens"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Memory:
    """What a head that points looks at, sample after sample.

    state_MD: states of what was read of the kind it writes; pointed_N: which of them each written token was. The last row of a
    sample comes after all that was pointed at in it, the row before it after all but one, and so on.
    """

    state_MD: Tensor
    lengths: tuple[int, ...]
    pointed_N: Tensor
    pointed_lengths: tuple[int, ...]


class Readout(nn.Module):
    """The learnable half of a head: a linear layer onto the vocabulary, and the learned tokens that open a written segment."""

    def __init__(self, width: int, vocab: int, queries: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02) if queries else None


class Head(Declared, ABC):
    """How one kind of answer is written. Subclass as a frozen dataclass.

    queries: learned tokens that stand at the start of the written segment; with none, the head reads the context's states.
    writes: whether the target's tokens follow them in the stream, each seeing those before (teacher forcing).
    continuous: whether what it writes are features, drawn by `draw`, and not ids chosen by their logits.
    points: whether it writes tokens that were read, chosen by their number; its `logits` and `state_loss` also get a `memory`.
    hides: whether it writes what `hidden` hides of a field that is read: its one query stands for each hidden token; its `answer`
    also gets what is `hidden`.
    pairs: whether it answers nothing, but tells which two sides of a task "a <-> b" belong together; those also get `left`, how
    many of the rows are of left sides.
    """

    queries: ClassVar[int] = 0
    writes: ClassVar[bool] = False
    continuous: ClassVar[bool] = False
    points: ClassVar[bool] = False
    hides: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    @abstractmethod
    def vocab(self, tokenizer: Tokenizer) -> int:
        """V, the width of the logits.

        Raises:
            ConfigError: this head cannot write that kind.
        """

    @abstractmethod
    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (rows, V) of the rows this head reads; `lengths` are the rows of each sample."""

    @abstractmethod
    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        """Sum of the losses of all real targets, in nats."""

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        """The loss from the states; a head whose loss needs more than logits overrides this."""
        return self.loss(self.logits(readout, state_ND, lengths), lengths, target, target_lengths)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of each row (rows,), in nats, of a head whose targets are one a row: what choices in attention learn from."""
        raise ConfigError(
            f"{type(self).__name__}: a Hard read is learned from the loss of each row, which this head does not tell; use Soft "
            "or Gumbel, or a head such as Classify or NextToken"
        )

    def draw(
        self,
        readout: Readout,
        state_ND: Tensor,
        noise_NF: Tensor,
        *,
        guide_ND: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The next features (N, F) of a continuous head and the logit (N,) of stopping instead; a function of the noise.

        With guide_ND, the states of the same samples without what they read, what is drawn is pushed away from theirs.
        """
        raise ConfigError(f"{type(self).__name__} writes no features")

    @abstractmethod
    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        """One answer a sample."""

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        """What the loss compares with, one entry a real target, made in the data workers; `rows` are those it is learned from.

        Raises:
            StreamError: this target cannot be learned from so few rows.
        """
        return tokens.content

    def pointed(self, tokens: Tokens, read: Tokens) -> Tensor:
        """Which of the tokens that were read (of the written kind) each of these is: (N,), for a head that points.

        Raises:
            StreamError: one that was not read.
        """
        raise ConfigError(f"{type(self).__name__} points at nothing")

    def hidden(self, tokens: Tokens, step: tuple[float, float, float], *, drawn: bool) -> Tensor:
        """Which tokens (N,) of a value are hidden, of a head that hides; some are and some are not.

        drawn: anew, from torch's global CPU generator; else the same ones for the same value.

        Raises:
            StreamError: a value of which no part can be hidden.
        """
        raise ConfigError(f"{type(self).__name__} hides nothing")

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        """Make the learnable half for a core of this width."""
        return Readout(width, self.vocab(tokenizer), self.queries)


def computes_as(head: Head, kind: type[Head]) -> bool:
    """Whether logits and loss are those of this class, and not what somebody derived from it."""
    return type(head).loss is kind.loss and type(head).logits is kind.logits


def vocabulary(head: Head, tokenizer: Tokenizer) -> int:
    """How many symbols a head that writes one after the other can choose among."""
    if tokenizer.vocab_size is None or tokenizer.classes:
        what = "its values are classes; use Classify" if tokenizer.classes else "it has no vocabulary"
        raise ConfigError(
            f"{type(head).__name__} writes symbol after symbol, which {type(tokenizer).__name__} is not: {what}"
        )
    return tokenizer.vocab_size


def check_smoothing(head: Any) -> None:
    if not 0 <= head.label_smoothing < 1:
        raise ConfigError(f"{type(head).__name__}: label_smoothing={head.label_smoothing} is not in 0 to 1")
