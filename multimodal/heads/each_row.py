"""A head with an answer for rows of the context: tags of words, classes of nodes, copying tasks, few-shot episodes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import (
    EncodedSample,
    Head,
    LaidOut,
    Prediction,
    Readout,
    class_count,
    encode_field,
    ranges,
    tied_linear,
    tokenizer_of,
)
from multimodal.heads.pool import First, Transformed
from multimodal.pattern import Field, Pattern
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError, did_you_mean
from multimodal.tokenizer import Tokenizer, Tokens, at_times, written_tokens


@final
@dataclass(frozen=True)
class EachRow(Head):
    """An answer for each row of the context: a class if the kind has ids, independent bits if it has features of 0 and 1.

    Rows for which `Tokenizer.answered` is False are left out: a graph may have answers for its nodes alone. An answer is a value of
    n tokens, or a list of n classes, for the last n rows in order; with `of` there must be one for each row. In a list None marks
    an answer that is not known, which has no loss and counts in no measure.

    of: the field that is answered, or a part of it, such as "page.words"; None: all that are read.
    last: number of rows that are answered; None: all of them in prediction, and as many as targets in training.
    transform: a norm, a dense layer or both, through which each state goes first, as Transformed(First(), ..); None: none.
    tied: whether logits are products with the embedded tokens, so that this head has no matrix of its own (Press & Wolf 2017).
    bias: whether the logits have a learned bias.
    """

    last: int | None = None
    transform: Transformed | None = None
    tied: bool = False
    bias: bool = True
    of: str | None = None
    measures: ClassVar[tuple[str, ...]] = ("loss", "exact", "rows")

    def __post_init__(self) -> None:
        if self.of is not None and self.last is not None:
            raise ConfigError(
                f"EachRow: of={self.of!r} answers all rows of this field, and last={self.last} some at the end; give one of them"
            )
        if self.transform is not None and self.transform.of != First():
            raise ConfigError(
                f"EachRow: transform={self.transform!r} pools rows, but each has an answer; make it Transformed(First(), ..)"
            )
        if self.last is not None and self.last < 1:
            raise ConfigError(f"EachRow: last={self.last} answers nothing; use 1 or more, or None for every row")

    def vocab(self, tokenizer: Tokenizer) -> int:
        return class_count(self, tokenizer)

    def bind(self, pattern: Pattern) -> Pattern:
        pattern = super().bind(pattern)
        names = [field.name for field in pattern.reads]
        if self.of is not None and (name := self.of.partition(".")[0]) not in names:
            raise TaskError(
                f"task {pattern.text!r}: EachRow(of={self.of!r}) answers the rows of {name!r}, which is not read; there are "
                f"{', '.join(names)}{did_you_mean(name, names)}"
            )
        return pattern

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """The rows that are read are those with an answer; with targets, those whose answer is known."""
        (part,) = super().lay_out(replace(sample, learn=False))
        row_N, target = self._rows(sample), None
        if not len(row_N):
            what = "what is read" if self.of is None else repr(self.of)
            raise StreamError(
                f"EachRow: no token of {what} has an answer of its own in this sample: it is None, or its tokenizer's `answered` "
                "names none; leave this sample out"
            )
        if sample.learn:
            tokens, known_N = _given(sample)
            self._check_count(len(known_N), len(row_N))
            _check_bits(tokens, sample.tokenizer)
            target = tokens.content
            if len(known_N):  # an empty answer has no rows of its own
                row_N = row_N[len(row_N) - len(known_N) :][known_N]
        return [replace(part, target=target, row_N=row_N if len(row_N) < part.read else None)]

    def any_answer(self, sample: EncodedSample) -> Tokens:
        """A possible answer of this sample, where none is given: zeros for every row that is answered."""
        count = len(self._rows(sample)) if self.last is None else self.last
        size = () if sample.tokenizer.vocab_size is not None else (sample.tokenizer.feature_size or 0,)
        dtype = torch.int64 if sample.tokenizer.vocab_size is not None else torch.float32
        return Tokens(torch.zeros(count, *size, dtype=dtype), torch.zeros(count, 3))

    def _rows(self, sample: EncodedSample) -> Tensor:
        """The rows (N,) of the sample that have an answer of their own."""
        rows, start = [], 0
        for field in sample.pattern.reads:
            for segment in sample.read([field]):
                if self._answers(field, segment.kind):
                    tokenizer = tokenizer_of(sample.tokenizers, segment.kind)
                    rows.append(start + answered_rows(tokenizer, segment.tokens).nonzero()[:, 0])
                start += len(segment.tokens)
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)

    def _answers(self, field: Field, kind: str) -> bool:
        """Whether tokens of this kind, in this field, are among those of `of`."""
        name, _, part = (self.of or "").partition(".")
        return self.of is None or (
            field.name == name and f"{kind}.".startswith(f"{field.kind}.{part}".rstrip(".") + ".")
        )

    def _check_count(self, count: int, rows: int) -> None:
        """Raise a StreamError unless an answer of `count` tokens is one for these rows."""
        if self.of is not None and count != rows:
            raise StreamError(
                f"EachRow: the answer has {count} tokens, but {self.of!r} has {rows} rows to answer in; give one for each, None "
                "where it is not known"
            )
        if count > rows:
            raise StreamError(f"EachRow: the answer has {count} tokens, but the context only {rows} rows to answer in")
        if self.last not in (None, count):
            raise StreamError(f"EachRow: the answer has {count} tokens, but last={self.last} rows are answered")

    def wanted(self, value: Any, tokenizer: Tokenizer) -> Any:
        elements = _elements(tokenizer, value)
        if elements is None:
            value = tokenizer.wanted(value)
            return [value] if tokenizer.classes else value
        known = [element for element in elements if element is not None]
        return [tokenizer.wanted(element) for element in known] if tokenizer.classes else tokenizer.wanted(known)

    def right_rows(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return ((logits > 0) == (target > 0.5)).all(-1)
        return logits.argmax(-1) == target

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        self._check_count(len(tokens), rows)
        _check_bits(tokens, tokenizer)
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


def _elements(tokenizer: Tokenizer, value: Any) -> list[Any] | None:
    """The answers of single rows if a value is a list of them; None: it is one value of its kind, whose tokens answer the rows."""
    if tokenizer.classes and getattr(value, "ndim", 0) == 1:  # an array of classes
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return None
    if (
        tokenizer.classes and tokenizer.vocab_size is None
    ):  # a list of classes is one answer, a list of lists is several
        listed = bool(value) and all(x is None or isinstance(x, (list, tuple, set, frozenset)) for x in value)
    else:
        listed = tokenizer.classes or any(x is None for x in value)
    return list(value) if listed else None


def _check_bits(tokens: Tokens, tokenizer: Tokenizer) -> None:
    if tokens.content.is_floating_point() and not ((tokens.content >= 0) & (tokens.content <= 1)).all():
        raise StreamError(
            f"EachRow: {type(tokenizer).__name__} gave features outside 0 to 1, but features are answered as bits"
        )


def _given(sample: EncodedSample) -> tuple[Tokens, Tensor]:
    """The tokens of the known answers, and for each row that is answered whether its answer is known (N,).

    Raises:
        StreamError: none is known, or an element of a list is not one token.
    """
    name, tokenizer = sample.pattern.answer, sample.tokenizer
    elements = _elements(tokenizer, sample.values[name])
    if elements is None:
        tokens = sample.answer()
        return tokens, torch.ones(len(tokens), dtype=torch.bool)
    known_N = torch.tensor([element is not None for element in elements], dtype=torch.bool)
    known = [element for element in elements if element is not None]
    if not known:
        raise StreamError(f"field {name!r}: no answer of its {len(elements)} rows is known; leave this sample out")
    if not tokenizer.classes:
        tokens = encode_field(tokenizer, known, sample.where, name)
        if len(tokens) != len(known):
            raise StreamError(
                f"EachRow: {len(known)} known elements of field {name!r} gave {len(tokens)} tokens, so None cannot stand for one "
                "of them; its kind must make one token of each"
            )
        return tokens, known_N
    parts: list[Tokens] = []
    cached: dict[Any, Tokens] = {}  # classes occur again and again
    for i, element in enumerate(elements):
        if element is None:
            continue
        key = (type(element), element) if isinstance(element, (str, int)) else None
        tokens = cached.get(key) or encode_field(tokenizer, element, sample.where, f"{name}[{i}]")
        if len(tokens) != 1:
            raise StreamError(f"EachRow: field {name!r}: element {i} gave {len(tokens)} tokens, but a class is one")
        if key is not None:
            cached[key] = tokens
        parts.append(tokens)
    return Tokens(torch.cat([t.content for t in parts]), torch.cat([t.position_NA for t in parts])), known_N


def answered_rows(tokenizer: Tokenizer, tokens: Tokens) -> Tensor:
    """`Tokenizer.answered`, checked.

    Raises:
        MediaError: it is no bool for each token.
    """
    answered_N = tokenizer.answered(tokens)
    if not isinstance(answered_N, Tensor) or answered_N.dtype != torch.bool or answered_N.shape != (len(tokens),):
        found = (
            f"{answered_N.dtype} {tuple(answered_N.shape)}"
            if isinstance(answered_N, Tensor)
            else type(answered_N).__name__
        )
        raise MediaError(
            f"{type(tokenizer).__name__}.answered gave {found}, wanted bool ({len(tokens)},): one for each token"
        )
    return answered_N


def last_rows(lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The last counts[i] rows of each sample i, for concatenated samples of these lengths."""
    count_B = torch.tensor(counts)
    return ranges(torch.tensor(lengths).cumsum(0) - count_B, count_B)
