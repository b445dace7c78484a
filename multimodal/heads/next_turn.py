"""The head of conversations: it writes the answering side's next turn, and learns its earlier ones in the same pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from multimodal.composite import Composite
from multimodal.heads.base import EncodedSample, Head, LaidOut
from multimodal.heads.next_token import NextToken
from multimodal.pattern import Field, Pattern
from multimodal.shapes import ConfigError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class NextTurn(NextToken):
    """Writes the next turn of a chat ("turns:chat -> text"), from the last token that is read; it is the default of such tasks.

    In training every turn of the assistant is learned in one pass: each of its tokens, and the stop behind it, from the tokens
    before. A sample needs no answer of its own: without one its last turn is the answer.

    It shares the weights of a `NextToken` of the same kind without a learned start; `NextTurn.of(head)` copies the settings of one.

    label_smoothing: the share of the target that is spread evenly over all tokens, from 0 to below 1.
    start_ids: always (), as a turn starts from the last token that is read.
    stop_id: the id of the vocabulary that ends a turn; None: a class of its own.
    tied: whether logits are products with the embedded tokens, so that this head has no matrix of its own (Press & Wolf 2017).
    bias: whether the logits have a learned bias.
    scale: factor of the states.
    cap: bound of the logits, which become cap * tanh(logits / cap); None: no bound.
    never: ids that are never written, such as marks that are only read; logits and loss know nothing of it.
    never_first: ids that do not begin a turn.
    """

    start_ids: tuple[int, ...] | None = ()
    shares: ClassVar[type[Head]] = NextToken

    @classmethod
    def of(cls, head: NextToken, **changes: Any) -> Self:
        """A head with the settings of a `NextToken`, such as that of a pretrained model, but no ids at the start."""
        settings = {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}
        return cls(**{**settings, "start_ids": (), **changes})

    def bind(self, pattern: Pattern) -> Pattern:
        if not pattern.pair and not pattern.reads:
            raise TaskError(f"task {pattern.text!r} reads nothing, and NextTurn answers turns; use NextToken")
        if self.start_ids != ():
            raise TaskError(
                f"task {pattern.text!r}: NextTurn starts from the last token that is read, as the turns before it do; leave "
                f"start_ids={self.start_ids} out"
            )
        return super().bind(pattern)

    def check_core(self, pattern: str, core: Any) -> None:
        if hasattr(core, "writer"):
            raise ConfigError(
                f"Model: task {pattern!r}: the reader of an EncoderDecoder reads the earlier turns, where none can be learned; use "
                "Core"
            )

    def complete(
        self, pattern: Pattern, values: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer], answers: bool
    ) -> Mapping[str, Any]:
        if answers and pattern.answer in values:
            return values
        for field, chat in _chats(pattern, tokenizers):
            value = values.get(field.name)
            if value is None or isinstance(value, Tokens):
                continue
            before, answer = chat.before_answer(value)
            if answer is not None and not answers:
                raise TaskError(
                    f"task {pattern.text!r}: the last turn of {field.name!r} is the answer itself; leave it out, or give its "
                    "beginning as begin"
                )
            if answer is not None:
                return {**values, field.name: before, pattern.answer: answer}
        return values

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        (part,) = super().lay_out(sample)
        if not sample.learn:
            return [part]
        assert part.target is not None
        said = {}
        for field, chat in _chats(sample.pattern, sample.tokenizers):
            said[f"{field.kind}.{chat.said}"] = chat.parts[chat.said or ""]
        rows, targets, start = [], [], 0
        for segment in part.segments:
            stop = start + len(segment.tokens)
            # each token is read from the one before it, and the stop from the last
            if segment.kind in said and 0 < start < part.read:
                if segment.bidirectional or said[segment.kind] != sample.pattern.writes.kind:
                    raise TaskError(
                        f"task {sample.pattern.text!r}: NextTurn learns {segment.kind!r}, which must be causal and of the "
                        f"written kind {sample.pattern.writes.kind!r}"
                    )
                rows.append(torch.arange(start - 1, stop))
                targets.append(self.target(segment.tokens, part.read, sample.tokenizer))
            start = stop
        row_N = torch.cat([*rows, torch.arange(part.first, part.last)])
        return [dataclasses.replace(part, row_N=row_N, target=torch.cat([*targets, part.target]))]


def _chats(pattern: Pattern, tokenizers: Mapping[str, Tokenizer]) -> list[tuple[Field, Composite]]:
    """The fields that hold turns of the answering side, with their tokenizers."""
    found = [(field, tokenizers[field.kind]) for field in pattern.reads if not field.many]
    return [(field, t) for field, t in found if isinstance(t, Composite) and t.said is not None]
