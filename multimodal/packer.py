"""Many samples laid end to end as one packed stream: no padding, no placeholders; made in the data workers.

sample {"image": .., "text": ..}                    task "image -> text"
    | tokenizers                                        | which fields, in which order, and the head
    v                                                   v
Tokens of every field  ------------------------->  segments of a sample  --end to end-->  Stream
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from multimodal.attention import Layout, Span
from multimodal.declare import check_ordered
from multimodal.heads import Head, default_head
from multimodal.heads.contrast import Contrast, fingerprint
from multimodal.masks import Places
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError, did_you_mean
from multimodal.stream import Reading, Stream
from multimodal.task import Pattern, Task
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, at_times


@dataclass
class _Segment:
    kind: str
    tokens: Tokens
    step: tuple[float, float, float]
    free: bool
    within: int | None = None  # the segment of the sample whose time it shares; None: it comes after all before it


@dataclass
class Prepared:
    """One sample, encoded. The right side of a pair lies in the stream as a sample of its own."""

    index: int
    pattern: str
    segments: list[_Segment]
    context: int  # tokens read
    target: Tensor | None
    span: Span
    key_N: Tensor | None = None  # of a head that points: what it may point at, counted in the sample
    pointed_N: Tensor | None = None
    side: int = 0  # of a pair: 0 left, 1 right
    right: "Prepared | None" = None
    hidden: tuple[Tokens, Tensor] | None = None  # of a head that hides: the tokens, and which of them

    def __len__(self) -> int:
        """Tokens."""
        return self.span.total + (0 if self.right is None else len(self.right))


def _span(segments: list[_Segment], read: int) -> Span:
    total = sum(len(s.tokens) for s in segments)
    free = next((i for i, s in enumerate(segments) if not s.free), len(segments))
    if any(s.free for s in segments[free:]):
        return Span(-1, total, read)
    return Span(sum(len(s.tokens) for s in segments[:free]), total, read)


class Packer:
    """Turns (task, sample) pairs into a Stream. Holds declarations only, so it is cheap to send to data workers."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer], tasks: Sequence[str | Task]) -> None:
        self.tokenizers = dict(tokenizers)
        check_ordered("tasks", tasks)
        for name, tokenizer in self.tokenizers.items():
            if not isinstance(tokenizer, Tokenizer):
                raise ConfigError(
                    f"tokenizers[{name!r}] is {type(tokenizer).__name__}, not a Tokenizer made by its constructor"
                )
        self.tasks: dict[str, Task] = {}
        self.patterns: dict[str, Pattern] = {}
        for task in tasks:
            task = Task(task) if isinstance(task, str) else task
            pattern = Pattern.parse(task.pattern)
            pattern.check_kinds(self.tokenizers)
            if task.pattern in self.tasks:
                raise TaskError(f"task {task.pattern!r} is given twice")
            head = task.head or (Contrast() if pattern.pair else default_head(self.tokenizers[pattern.writes.kind]))
            if head.pairs != pattern.pair:
                raise TaskError(
                    f"task {task.pattern!r}: '<->' wants a head that tells which two belong together, such as Contrast, and those "
                    f"want '<->', but the head is {type(head).__name__}"
                )
            head.vocab(self.tokenizers[pattern.fields[-1].kind])
            if head.points and pattern.writes.kind not in [field.kind for field in pattern.reads]:
                raise TaskError(
                    f"task {task.pattern!r} reads nothing of kind {pattern.writes.kind!r}, but {type(head).__name__} writes "
                    f"tokens that were read; read some, as in 'seen:{pattern.writes.kind} -> {task.pattern.split('->')[1].strip()}'"
                )
            if head.hides:
                pattern = dataclasses.replace(pattern, hides=True)
                if (pattern.writes.name, pattern.writes.kind) not in [
                    (field.name, field.kind) for field in pattern.reads
                ]:
                    raise TaskError(
                        f"task {task.pattern!r} does not read {pattern.writes.name!r}, but {type(head).__name__} writes what is "
                        f"hidden of a field that is read, as in '{pattern.writes.kind} -> {pattern.writes.kind}'"
                    )
            if not pattern.reads and not head.queries:
                raise TaskError(
                    f"task {task.pattern!r} reads nothing, and {type(head).__name__} answers only from what was read"
                )
            self.tasks[task.pattern] = dataclasses.replace(task, head=head)
            self.patterns[task.pattern] = pattern
        self._opening = {pattern: self._queries(pattern) for pattern in self.tasks}

    def head(self, pattern: str) -> Head:
        head = self.tasks[pattern].head
        assert head is not None
        return head

    def head_key(self, pattern: str) -> str:
        """Tasks that write the same kind by the same head share its weights: they have the same key."""
        fields = self.patterns[pattern]
        sides = fields.sides.values() if fields.pair else [[fields.writes]]
        kinds = "__".join("_".join(field.kind for field in side) for side in sides)
        return f"{kinds}_{type(self.head(pattern)).__name__}"

    def _queries(self, pattern: str) -> _Segment:
        """The learned tokens that open what is written: the same in every sample."""
        with torch.device("cpu"):  # where samples are, also of a model that is made without memory
            time_N = torch.arange(self.head(pattern).queries)
            tokens = Tokens(time_N, at_times(time_N))
        return _Segment("head:" + self.head_key(pattern), tokens, (1.0, 1.0, 1.0), False)

    def check_task(self, pattern: str, *, answers: bool = False) -> None:
        """Raises a TaskError unless this is one of the tasks; with answers=True, one that writes something."""
        if pattern not in self.tasks:
            raise TaskError(
                f"there is no task {shortened(repr(pattern), 100)}; there are {', '.join(map(repr, self.tasks))}"
                f"{did_you_mean(pattern, self.tasks)}"
            )
        if answers:
            self.patterns[pattern].check_answers()

    def __call__(
        self,
        batch: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        answers: bool = True,
        names: Sequence[str] | None = None,
        begun: Sequence[Any] | None = None,
        drawn: bool = False,
    ) -> Stream:
        """Pack a batch; with answers=False nothing is written yet (prediction, the prompt of generation).

        A field may also be given as the Tokens that its tokenizer made of it. names: what errors call each sample; "sample 0",
        "sample 1", .. unless given. begun: for each sample the beginning of its answer, if that much is written already (None:
        nothing is), which the reading's last row of the sample then continues. drawn: heads that hide draw anew what they hide;
        else the same value is hidden alike every time, also alone.

        Raises:
            TaskError: an unknown task or a missing field.
            StreamError: a sample with nothing to read, a target that cannot be learned.
            MediaError: from the tokenizer of a field; says which sample of the batch.
        """
        if not batch:
            raise StreamError("Packer: the batch is empty")
        names = names or [f"sample {i}" for i in range(len(batch))]
        started = begun or [None] * len(batch)
        return self.lay(
            [
                self.prepare(pattern, sample, names[i], answers=answers, begun=started[i], drawn=drawn)
                for i, (pattern, sample) in enumerate(batch)
            ],
            answers=answers,
        )

    def lay(self, prepared: Sequence[Prepared], *, answers: bool = True) -> Stream:
        """One stream of samples that were prepared, in any order."""
        samples = [
            dataclasses.replace(side, index=i)
            for i, sample in enumerate(prepared)
            for side in (sample, sample.right)
            if side is not None
        ]
        samples.sort(key=lambda s: s.span)  # equal shapes side by side: they run as one batch of the fused kernel
        return self._lay(samples, answers)

    def prepare(
        self,
        pattern_text: str,
        values: Mapping[str, Any],
        name: str,
        *,
        answers: bool = True,
        begun: Any = None,
        drawn: bool = True,
    ) -> Prepared:
        """One sample encoded, to be laid with others: everything about it that does not depend on its neighbours.

        drawn: a head that hides draws anew what it hides, from torch's global generator.

        Raises:
            As calling the packer does.
        """
        self.check_task(pattern_text)
        pattern, head = self.patterns[pattern_text], self.head(pattern_text)
        pattern.check_sample(values, answers)
        encoded = self.encoded(pattern_text, values, name)
        if pattern.pair and begun is None:
            return self._pair(pattern, encoded, name, answers)
        segments = self._read(pattern, encoded)
        hidden = self._hide(pattern_text, encoded, segments, drawn, name) if head.hides else None
        context = sum(len(s.tokens) for s in segments if s.within is None)
        if pattern.reads and not context and not head.writes:
            raise StreamError(
                f"{name} of task {pattern_text!r}: every field that is read is None; give at least one, "
                f"as {type(head).__name__} answers only from what was read"
            )
        read, key_N, pointed_N = Tokens(torch.empty(0), torch.empty(0, 3)), None, None
        if head.points:
            read, key_N = _of_kind(segments, pattern.writes.kind)
            pointed_N = key_N[:0]
        if head.queries and not head.hides:
            segments.append(self._opening[pattern_text])
        target = None
        if answers:
            kind, where = pattern.writes.kind, f"{name} of task {pattern_text!r}"
            tokenizer = self.tokenizers[kind]
            if hidden:
                tokens = Tokens(hidden[0].content[hidden[1]], hidden[0].position_NA[hidden[1]])
            elif values[pattern.answer] is None:
                nothing = " ('' is an answer too: nothing is written)" if tokenizer.text else ""
                raise StreamError(
                    f"{where}: field {pattern.answer!r} is None, that is not given, but it is what is learned; "
                    f"give its value{nothing}, or leave this sample out"
                )
            else:
                tokens = self.encode(kind, values[pattern.answer], where, pattern.answer, empty=True)
            try:
                if pointed_N is None:
                    target = head.target(tokens, context, tokenizer)
                else:
                    pointed_N = head.pointed(tokens, read)
                    target = head.target(Tokens(pointed_N, tokens.position_NA), len(read), tokenizer)
                    tokens = Tokens(tokens.content, read.position_NA[pointed_N])
            except StreamError as error:
                raise StreamError(f"{where}: {error}") from None
            if head.writes and len(tokens):
                segments.append(_Segment(pattern.writes.kind, tokens, tokenizer.step, False))
        elif begun is not None:
            if not head.writes:
                raise TaskError(
                    f"task {pattern_text!r}: {type(head).__name__} answers at once; nothing can be begun for it"
                )
            tokenizer = self.tokenizers[pattern.writes.kind]
            tokens = self.encode(
                pattern.writes.kind, begun, f"{name} of task {pattern_text!r}", f"begin ({pattern.answer})"
            )
            if pointed_N is not None:
                pointed_N = head.pointed(tokens, read)
                tokens = Tokens(tokens.content, read.position_NA[pointed_N])
            segments.append(_Segment(pattern.writes.kind, tokens, tokenizer.step, False))
        return Prepared(
            0, pattern_text, segments, context, target, _span(segments, context), key_N, pointed_N, hidden=hidden
        )

    def _pair(self, pattern: Pattern, encoded: Mapping[str, Tokens | None], name: str, answers: bool) -> Prepared:
        """Two samples, each ended by its side's learned token; without answers one side may lack."""
        sides, target = [], []
        for side, fields in enumerate(pattern.sides.values()):
            segments = self._read(pattern, {field.name: encoded[field.name] for field in fields})
            if not segments and not answers and side == len(sides):
                continue
            if not segments:
                raise StreamError(
                    f"{name} of task {pattern.text!r}: every field of the side {' '.join(f.name for f in fields)!r} is None; "
                    "give at least one"
                )
            context = sum(len(s.tokens) for s in segments)
            target.append(fingerprint(s.tokens for s in segments))
            query = Tokens(torch.tensor([side]), at_times(torch.zeros(1)))
            segments.append(_Segment("head:" + self.head_key(pattern.text), query, (1.0, 1.0, 1.0), False))
            sides.append(Prepared(0, pattern.text, segments, context, None, _span(segments, context), side=side))
        return dataclasses.replace(
            sides[0], target=torch.tensor([target]) if answers else None, right=sides[1] if len(sides) > 1 else None
        )

    def _hide(
        self, task: str, encoded: Mapping[str, Tokens | None], segments: list[_Segment], drawn: bool, name: str
    ) -> tuple[Tokens, Tensor]:
        """Take the hidden tokens out of the segment they are in, and put the head's query in their places, as the last segment."""
        pattern, head = self.patterns[task], self.head(task)
        where = f"{name} of task {task!r}, field {pattern.writes.name!r}"
        whole, step = encoded[pattern.writes.name], self.tokenizers[pattern.writes.kind].step
        if whole is None:
            raise StreamError(f"{where} is None, but it is what {type(head).__name__} hides and rebuilds")
        try:
            hidden_N = head.hidden(whole, step, drawn=drawn)
        except StreamError as error:
            raise StreamError(f"{where}: {error}") from None
        at = [f.name for f in pattern.reads if encoded[f.name] is not None].index(pattern.writes.name)
        seen = Tokens(whole.content[~hidden_N], whole.position_NA[~hidden_N])
        segments[at] = _Segment(pattern.writes.kind, seen, step, True)
        place_NA = whole.position_NA[hidden_N]
        query = Tokens(torch.zeros(len(place_NA), dtype=torch.long), place_NA)
        segments.append(_Segment("head:" + self.head_key(task), query, step, True, within=at))
        return whole, hidden_N

    def _read(self, pattern: Pattern, encoded: Mapping[str, Tokens | None]) -> list[_Segment]:
        """The segments of what is read; fields that are None, or are not given, are left out."""
        segments = []
        for field in pattern.reads:
            tokens, tokenizer = encoded.get(field.name), self.tokenizers[field.kind]
            if tokens is not None:
                segments.append(_Segment(field.kind, tokens, tokenizer.step, not tokenizer.causal))
        return segments

    def pointable(self, pattern_text: str, encoded: Mapping[str, Tokens | None]) -> Tokens:
        """What a head that points may point at: everything that is read of the kind that is written."""
        pattern = self.patterns[pattern_text]
        return _of_kind(self._read(pattern, encoded), pattern.writes.kind)[0]

    def encoded(self, pattern_text: str, values: Mapping[str, Any], name: str) -> dict[str, Tokens | None]:
        """The tokens of every field that a task reads."""
        where = f"{name} of task {pattern_text!r}"
        return {
            field.name: None
            if values[field.name] is None
            else self.encode(field.kind, values[field.name], where, field.name)
            for field in self.patterns[pattern_text].reads
        }

    def encode(self, kind: str, value: Any, where: str, name: str, *, empty: bool = False) -> Tokens:
        """The tokens of one value of one field; only with `empty` may there be none. A MediaError says where the value stands."""
        if isinstance(value, Tokens):
            return value
        try:
            return self.tokenizers[kind](value, empty=empty)
        except ValueError as error:
            raise MediaError(f"{where}, field {name!r}: {shortened(error, 500)}") from error

    def prompt(self, pattern_text: str, encoded: Mapping[str, Tokens | None]) -> Stream:
        """A stream of one sample that holds some fields of a task and nothing to be written."""
        segments = self._read(self.patterns[pattern_text], encoded)
        context = sum(len(s.tokens) for s in segments)
        if not context:
            raise StreamError(f"task {pattern_text!r}: there is nothing to read, as every field is None")
        return self._lay([Prepared(0, "", segments, context, None, _span(segments, context))], False)

    def _lay(self, samples: list[Prepared], answers: bool) -> Stream:
        segments = [segment for sample in samples for segment in sample.segments]
        sizes = torch.tensor([len(s.tokens) for s in segments])
        starts = sizes.cumsum(0) - sizes
        spans = tuple(sample.span for sample in samples)
        totals = torch.tensor([span.total for span in spans])
        stream_size = int(totals.sum())

        by_kind: dict[str, list[int]] = {}
        for i, segment in enumerate(segments):
            by_kind.setdefault(segment.kind, []).append(i)
        order_T = None
        content = {kind: torch.cat([segments[i].tokens.content for i in which]) for kind, which in by_kind.items()}
        if len(by_kind) > 1:
            row_T = torch.cat([_ranges(starts[which], sizes[which]) for which in by_kind.values()])
            order_T = torch.empty_like(row_T)
            order_T[row_T] = torch.arange(stream_size)

        sample_of = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.segments) for s in samples]))
        places = Places(
            sample=torch.arange(len(samples), dtype=torch.int32).repeat_interleave(totals),
            order=torch.arange(stream_size, dtype=torch.int32)
            - (totals.cumsum(0) - totals).int().repeat_interleave(totals),
            free=torch.tensor([s.free for s in segments], dtype=torch.int32).repeat_interleave(sizes),
            segment=(torch.arange(len(segments)) - torch.searchsorted(sample_of, sample_of))
            .int()
            .repeat_interleave(sizes),
        )
        return Stream(
            content=content,
            order_T=order_T,
            position_TA=self._positions(samples, segments, sizes),
            layout=Layout(spans, places),
            readings=self._readings(samples, (totals.cumsum(0) - totals).tolist(), answers),
        )

    @staticmethod
    def _positions(samples: list[Prepared], segments: list[_Segment], sizes: Tensor) -> Tensor:
        """Places in steps; the time 0 of each field is one step after the last token of the field before it."""
        step = torch.tensor([s.step for s in segments]).repeat_interleave(sizes, 0)
        position_TA = torch.cat([s.tokens.position_NA for s in segments]) / step
        last = torch.segment_reduce(position_TA[:, 0].contiguous(), "max", lengths=sizes).tolist()
        offsets, at = [], 0
        for sample in samples:
            ends: dict[int, float] = {}
            for i, segment in enumerate(sample.segments):
                i = i if segment.within is None else segment.within
                end = round(last[at], 3) + 1.0  # 14.999999 is 15: seconds divided by a step are seldom whole
                ends[i] = max(end, ends[i]) if i in ends else end
                at += 1
            starts = dict(zip(ends, accumulate(ends.values(), initial=0.0), strict=False))
            offsets += [starts[i if s.within is None else s.within] for i, s in enumerate(sample.segments)]
        position_TA[:, 0] += torch.tensor(offsets).repeat_interleave(sizes)
        return position_TA

    def _readings(self, samples: list[Prepared], starts: list[int], answers: bool) -> dict[str, Reading]:
        readings = {}
        for pattern in self.tasks:
            mine = [(sample, start) for sample, start in zip(samples, starts, strict=True) if sample.pattern == pattern]
            if not mine:
                continue
            pair = self.patterns[pattern].pair
            if pair:
                mine.sort(key=lambda m: (m[0].side, m[0].index))
            skip = [s.context if self.head(pattern).queries else 0 for s, _ in mine]
            lengths = [
                (s.span.total if self.head(pattern).queries else s.context) - n
                for (s, _), n in zip(mine, skip, strict=True)
            ]
            first = torch.tensor([start + n for (_, start), n in zip(mine, skip, strict=True)])
            targets = [s.target for s, _ in mine if s.target is not None]
            keys = [s.key_N + start for s, start in mine if s.key_N is not None]
            pointed = [s.pointed_N for s, _ in mine if s.pointed_N is not None]
            readings[pattern] = Reading(
                row_N=_ranges(first, torch.tensor(lengths)),
                lengths=tuple(lengths),
                samples=tuple(s.index for s, _ in mine),
                target=torch.cat(targets) if answers else None,
                target_lengths=tuple(len(t) for t in targets),
                key_N=torch.cat(keys) if keys else None,
                key_lengths=tuple(map(len, keys)),
                pointed_N=torch.cat(pointed) if pointed else None,
                pointed_lengths=tuple(map(len, pointed)),
                hidden=() if answers else tuple(s.hidden for s, _ in mine if s.hidden is not None),
                left=sum(s.side == 0 for s, _ in mine) if pair else None,
            )
        return readings


def _of_kind(segments: list[_Segment], kind: str) -> tuple[Tokens, Tensor]:
    """All tokens of a kind among those read, and where in the sample they lie."""
    found, rows, start = [], [], 0
    for segment in segments:
        stop = start + len(segment.tokens)
        if segment.kind == kind:
            found.append(segment.tokens)
            rows.append(torch.arange(start, stop))
        start = stop
    if len(found) == 1:
        return found[0], rows[0]
    if not found:
        return Tokens(torch.empty(0), torch.empty(0, 3)), torch.empty(0, dtype=torch.long)
    return Tokens(torch.cat([t.content for t in found]), torch.cat([t.position_NA for t in found])), torch.cat(rows)


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """[start, start + 1, .., start + size - 1] of each, end to end."""
    within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return starts.repeat_interleave(sizes) + within
