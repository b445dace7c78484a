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
    Reading,
    Readout,
    class_count,
    encode_field,
    ranges,
    tied_linear,
    tokenizer_of,
)
from multimodal.heads.pool import First, Transformed
from multimodal.pattern import Field, Pattern
from multimodal.positions import steps_of
from multimodal.shapes import AXES, ConfigError, MediaError, StreamError, TaskError, did_you_mean
from multimodal.tokenizer import Tokenizer, Tokens, at_times, written_tokens

UNKNOWN = -1  # the target of a group of features that are all 0


@final
@dataclass(frozen=True)
class EachRow(Head):
    """An answer for each row of the context: a class if the kind has ids, independent bits if it has features of 0 and 1, and a
    class for each group of features if the kind is `one_hot`, such as the pixels of a patch.

    Rows for which `Tokenizer.answered` is False are left out: a graph may have answers for its nodes alone. An answer is a value of
    n tokens, or a list of n classes, for the last n of these rows in order; with `of` one for each of them. In a list None marks an
    answer that is not known, which has no loss and counts in no measure. The same holds for a group of features that are all 0.

    The measure "rows" is the share of rows that are right, of a `one_hot` kind that of groups. In a row of n groups each has 1/n of
    the loss. Answers of such a kind stand where the rows stand that they answer.

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
            target = targets_of(tokens, sample.tokenizer)
            if sample.tokenizer.one_hot is not None:
                _check_grid(sample, tokens, row_N[len(row_N) - len(known_N) :][known_N])
                some_N = (target != UNKNOWN).any(1)
                target, known_N = target[some_N], known_N.masked_scatter(known_N, some_N)
                if not len(target):
                    raise StreamError(f"nothing of field {sample.pattern.answer!r} is known; leave this sample out")
            if len(known_N):  # an empty answer has no rows of its own
                row_N = row_N[len(row_N) - len(known_N) :][known_N]
        return [replace(part, target=target, row_N=row_N if len(row_N) < part.read else None)]

    def any_answer(self, sample: EncodedSample) -> Tokens:
        """An answer that this sample may have, which says nothing: zeros for every row, or the first class of each group."""
        count = len(self._rows(sample)) if self.last is None else self.last
        size = () if sample.tokenizer.vocab_size is not None else (sample.tokenizer.feature_size or 0,)
        dtype = torch.int64 if sample.tokenizer.vocab_size is not None else torch.float32
        content = torch.zeros(count, *size, dtype=dtype)
        if sample.tokenizer.one_hot is not None:
            content[:, :: sample.tokenizer.one_hot] = 1
        return Tokens(content, torch.zeros(count, len(sample.tokenizer.axes)))

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

    def right_rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if target.is_floating_point():
            right_N = ((logits > 0) == (target > 0.5)).all(-1)
        elif target.dim() == 2:
            right = logits.unflatten(1, (target.shape[1], -1)).argmax(-1) == target
            return right.sum(1), (target != UNKNOWN).sum(1)
        else:
            right_N = logits.argmax(-1) == target
        return right_N.long(), torch.ones_like(right_N, dtype=torch.long)

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        self._check_count(len(tokens), rows)
        return targets_of(tokens, tokenizer)

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
        if target.dim() == 2:
            logits, groups = answered.unflatten(1, (target.shape[1], -1)).flatten(0, 1), target.shape[1]
            return F.cross_entropy(logits, target.flatten(), ignore_index=UNKNOWN, reduction="sum") / groups
        return F.cross_entropy(answered, target, reduction="sum")

    def answer_inputs(self, reading: Reading, position_TA: Tensor) -> dict[str, Any]:
        return {"position_NA": position_TA[reading.row_N]}

    def answer(
        self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer, position_NA: Tensor | None = None
    ) -> list[Prediction]:
        """The answer of each sample. position_NA: where the rows stand, which answers of a `one_hot` kind share."""
        answers, at = [], 0
        for rows in logits.float().cpu().split(list(lengths)):
            at += len(rows)
            rows = rows if self.last is None else rows[-self.last :]
            if tokenizer.one_hot is not None:
                best, number = rows.unflatten(1, (-1, tokenizer.one_hot)).log_softmax(-1).max(-1)
                content, sure = F.one_hot(number, tokenizer.one_hot).flatten(1).float(), best.sum()
            elif tokenizer.vocab_size is None:
                content, sure = (rows > 0).float(), F.logsigmoid(rows.abs()).sum()
            else:
                best, content = rows.log_softmax(-1).max(-1)
                sure = best.sum()
            if tokenizer.classes:
                first_NA = at_times(torch.zeros(1), tokenizer.axes)
                value = [tokenizer.decode(Tokens(row[None], first_NA)) for row in content]
            elif tokenizer.one_hot is not None and position_NA is not None:
                value = tokenizer.decode(_in_place(content, position_NA[at - len(rows) : at].cpu(), tokenizer))
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


def targets_of(tokens: Tokens, tokenizer: Tokenizer) -> Tensor:
    """Ids (N,), bits (N, F), or of a `one_hot` kind the number of the 1 of each group (N, groups), UNKNOWN where there is none.

    Raises:
        StreamError: the content is none of them.
    """
    content, name = tokens.content, type(tokenizer).__name__
    if content.is_floating_point() and not ((content >= 0) & (content <= 1)).all():
        raise StreamError(f"EachRow: {name} gave features outside 0 to 1, but features are answered as bits")
    if tokenizer.one_hot is None:
        return content
    groups = content.unflatten(1, (-1, tokenizer.one_hot))
    ones = groups.sum(-1)
    if not bool(((groups == 1).sum(-1) == ones).all() and (ones <= 1).all()):
        raise StreamError(
            f"EachRow: {name} declares one_hot={tokenizer.one_hot}, but gave a group of features that is not a 1 among 0s"
        )
    return groups.argmax(-1).masked_fill(ones == 0, UNKNOWN)


def _check_grid(sample: EncodedSample, tokens: Tokens, row_N: Tensor) -> None:
    """Raise a StreamError if an answer that lies in rows and columns does not lie in as many as what it answers, as if turned."""
    read_NA = torch.cat([segment.tokens.position_NA[:, 1:3] for segment in sample.read()])[row_N]
    (rows, columns), answer = (
        tuple(len(place_N.unique()) for place_N in place_NA.unbind(1))
        for place_NA in (read_NA, tokens.position_NA[:, 1:3])
    )
    if answer not in ((rows, columns), (1, 1)):
        raise StreamError(
            f"field {sample.pattern.answer!r} lies in {answer[0]} rows and {answer[1]} columns of tokens, but what it answers in "
            f"{rows} and {columns}; it may be turned, or belong to another picture"
        )


def _in_place(content: Tensor, position_NA: Tensor, tokenizer: Tokenizer) -> Tokens:
    """Answers where the rows stand that they answer: at their row and column, and from time 0. position_NA: in steps."""
    place_NA = torch.zeros(len(content), len(tokenizer.axes))
    place_NA[:, : len(AXES)] = position_NA[:, : len(AXES)]
    place_NA[:, 0] -= place_NA[:, 0].min()
    return Tokens(content, place_NA * steps_of(tokenizer.step, len(tokenizer.axes)))


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
