"""Heads read the answer off the stream's states: two verbs, `logits` and `loss`, and `answer` for people."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.cross_entropy import linear_cross_entropy
from multimodal.declare import Declared
from multimodal.shapes import ConfigError, StreamError
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


@dataclass(frozen=True)
class Classify(Head):
    """One class, or several at once where the tokenizer declares a multi-hot feature for each class.

    The answer is read from a learned token that looks at the whole context.

    label_smoothing: the share of the target that is spread evenly over all classes, from 0 to below 1 (Szegedy et al. 2016).
    """

    label_smoothing: float = 0.0
    queries: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_smoothing(self)

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
        classes = tokenizer.vocab_size or tokenizer.feature_size
        if not classes:
            raise ConfigError(
                f"Classify: {type(tokenizer).__name__} declares no vocab_size or feature_size to choose from"
            )
        return classes

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        if target.is_floating_point():  # multi-hot: mean over classes, so that its size is that of a single decision
            return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(-1).sum()
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="sum")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        if target.is_floating_point() or not _own(self, Classify):
            return super().state_loss(readout, state_ND, lengths, target, target_lengths)
        return linear_cross_entropy(readout.linear, state_ND, target, self.label_smoothing)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(-1)
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        several = tokenizer.vocab_size is None
        probability = logits.float().sigmoid() if several else logits.float().softmax(-1)
        if several:
            names = tokenizer.decode(Tokens(torch.ones(1, logits.shape[-1]), torch.zeros(1, 3)))
        else:
            names = [tokenizer.decode(one_class(c, tokenizer)) for c in range(logits.shape[-1])]
        answers = []
        for row in probability.tolist():
            by_name = dict(sorted(zip(names, row, strict=True), key=lambda item: -item[1]))
            if several:
                chosen = [name for name, p in zip(names, row, strict=True) if p >= 0.5]  # in the order of decode
                sure = min(max(p, 1 - p) for p in row)
                answers.append(Prediction(chosen, sure, by_name))
            else:
                best = next(iter(by_name))
                answers.append(Prediction(best, by_name[best], by_name))
        return answers


def _own(head: Head, kind: type[Head]) -> bool:
    """Whether logits and loss are those of this class, and not what somebody derived from it."""
    return type(head).loss is kind.loss and type(head).logits is kind.logits


def one_class(c: int, tokenizer: Tokenizer) -> Tokens:
    """The tokens that stand for class c alone."""
    if tokenizer.vocab_size is not None:
        return Tokens(torch.tensor([c]), torch.zeros(1, 3))
    assert tokenizer.feature_size is not None
    return Tokens(F.one_hot(torch.tensor([c]), tokenizer.feature_size).float(), torch.zeros(1, 3))


@dataclass(frozen=True)
class NextToken(Head):
    """Writes token after token, from a learned start to a learned stop: class V of the V + 1 that it chooses among.

    label_smoothing: the share of the target that is spread evenly over all tokens, from 0 to below 1.
    """

    label_smoothing: float = 0.0
    queries: ClassVar[int] = 1
    writes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_smoothing(self)

    def vocab(self, tokenizer: Tokenizer) -> int:
        symbols = _symbols(self, tokenizer)
        try:
            tokenizer.places(1)
        except ConfigError as error:
            raise ConfigError(f"NextToken cannot write {type(tokenizer).__name__}: {error}") from error
        return symbols + 1

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(state_ND)

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        if tokenizer.length not in (None, len(tokens)):
            raise StreamError(
                f"NextToken: the answer has {len(tokens)} tokens, but every written {type(tokenizer).__name__} has "
                f"{tokenizer.length}; bring it to that size first"
            )
        return F.pad(tokens.content, (0, 1), value=self.vocab(tokenizer) - 1)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="sum")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        if not _own(self, NextToken):
            return super().state_loss(readout, state_ND, lengths, target, target_lengths)
        return linear_cross_entropy(readout.linear, state_ND, target, self.label_smoothing)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("NextToken: an answer is written step by step; use Model.generate")


@dataclass(frozen=True)
class CTC(Head):
    """Connectionist temporal classification (Graves et al. 2006): a symbol or a blank (class V) for every row of the context."""

    def vocab(self, tokenizer: Tokenizer) -> int:
        return _symbols(self, tokenizer) + 1

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        ids = tokens.content
        needed = len(ids) + int((ids[1:] == ids[:-1]).sum())
        if needed > rows:
            raise StreamError(
                f"CTC: {len(ids)} symbols need at least {needed} rows (one each, one more between equal neighbours), but the "
                f"context has {rows}; use shorter hops or stack fewer frames, or a tokenizer with longer symbols"
            )
        return ids

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        # PyTorch's CTC wants (time, batch, class): the one place where rows of unequal samples are laid side by side
        rows = nn.utils.rnn.pad_sequence(list(logits.float().log_softmax(-1).split(list(lengths))))
        return F.ctc_loss(
            rows,
            target,
            torch.tensor(lengths),
            torch.tensor(target_lengths),
            blank=logits.shape[-1] - 1,
            reduction="sum",
        )

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        blank = logits.shape[-1] - 1
        answers = []
        for rows in logits.float().log_softmax(-1).split(list(lengths)):
            best, path = rows.max(-1)
            ids = torch.unique_consecutive(path)
            ids = ids[ids != blank].cpu()
            value = tokenizer.decode(Tokens(ids, tokenizer.places(len(ids))))
            answers.append(Prediction(value, float(best.sum().exp())))
        return answers


def _symbols(head: Head, tokenizer: Tokenizer) -> int:
    """How many symbols a head that writes one after the other can choose among."""
    if tokenizer.vocab_size is None or tokenizer.classes:
        what = "its values are classes; use Classify" if tokenizer.classes else "it has no vocabulary"
        raise ConfigError(
            f"{type(head).__name__} writes symbol after symbol, which {type(tokenizer).__name__} is not: {what}"
        )
    return tokenizer.vocab_size


def _check_smoothing(head: Any) -> None:
    if not 0 <= head.label_smoothing < 1:
        raise ConfigError(f"{type(head).__name__}: label_smoothing={head.label_smoothing} is not in 0 to 1")


def default_head(tokenizer: Tokenizer) -> Head:
    """What a kind is written with unless its task says otherwise: classes by `Classify`, other discrete kinds by `NextToken`."""
    if tokenizer.classes:
        return Classify()
    if tokenizer.vocab_size is not None:
        return NextToken()
    raise ConfigError(
        f"{type(tokenizer).__name__} is continuous and declares no classes, so no head writes it by default; give its task one"
    )
