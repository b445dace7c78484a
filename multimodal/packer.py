"""Packing: many samples end to end as one stream, without padding and placeholders; this runs in the data workers.

sample {"image": .., "text": ..}                    task "image -> text"
    | tokenizers                                        | which fields, in which order, and the head
    v                                                   v
Tokens of every field  ------------------------->  segments of a sample  --end to end-->  Stream
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multimodal.attention import Layout, Span
from multimodal.composite import Composite, Written, leaves
from multimodal.declare import check_ordered
from multimodal.heads import Contrast, Head, NextToken, NextTurn, default_head
from multimodal.heads.base import (
    EncodedSample,
    LaidOut,
    Segment,
    encode_field,
    encode_read,
    ranges,
    tokens_of,
    weights_class,
)
from multimodal.masks import MaskInfo
from multimodal.pattern import Field, Pattern
from multimodal.positions import check_axes
from multimodal.relations import Links, linked
from multimodal.shapes import AXES, ConfigError, StreamError, TaskError, did_you_mean
from multimodal.stream import Reading, Stream
from multimodal.task import Task
from multimodal.texts import shortened
from multimodal.tokenizer import Places, Tokenizer, Tokens


@dataclass
class Prepared:
    """One sample of a task, laid out by its head; nothing in it depends on the samples that it will be packed with.

    task: the pattern of its task.
    parts: its samples of the stream: one, or two for the sides of a pair.
    tokens: number of tokens, which is asked for again and again while packs are chosen.
    """

    task: str
    parts: list[LaidOut]
    tokens: int

    def __len__(self) -> int:
        """Number of tokens."""
        return self.tokens


class _Placed(NamedTuple):
    """A part of a prepared sample, with the number of this sample in the batch, its task, and its numbers of tokens."""

    sample: int
    task: str
    part: LaidOut
    span: Span


def _span(part: LaidOut) -> Span:
    segments, total = part.segments, tokens_of(part.segments)
    causal = next((i for i, s in enumerate(segments) if not s.bidirectional), len(segments))
    if any(s.bidirectional for s in segments[causal:]):
        return Span(-1, total, part.read)
    return Span(tokens_of(segments[:causal]), total, part.read)


class Packer:
    """Turns (task, sample) pairs into a Stream. It has no weights, so it is cheap to send to data workers.

    tokenizers: by name of a kind, its tokenizer; tasks, patterns, heads: by pattern, the task, its parsed pattern and its head.
    keys: by pattern, the name of its head's weights; tasks that write the same kinds by the same class of head share them.
    answer_tokenizers: by pattern, the tokenizer of the written field; for a pair, that of its last field.
    kinds: by kind of a segment, also of parts of a composite ("page.picture"), its tokenizer and the kind whose weights embed it.
    written_parts: by name of a composite kind that some task writes, its tokenizer there.
    starts: by pattern, the tokens between what is read and what is written, the same in every sample.
    axes: the position axes of its streams, which are those of the model's core; if not given, those of all its kinds.
    relations: the names of the relations of all kinds; two kinds may share one.
    reads_places: the kinds whose embeddings depend on the places of tokens; the model sets it, since it has the embeddings.
    most_times: the times for which the core has learned positions, of an EncoderDecoder those of reader and writer; None: any. The
        model sets it.
    """

    reads_places: frozenset[str] = frozenset()
    most_times: int | tuple[int | None, int | None] | None = None

    def __init__(
        self, tokenizers: Mapping[str, Tokenizer], tasks: Sequence[str | Task], axes: tuple[str, ...] | None = None
    ) -> None:
        self.tokenizers = dict(tokenizers)
        check_ordered("tasks", tasks)
        for name, tokenizer in self.tokenizers.items():
            if not isinstance(tokenizer, Tokenizer):
                raise ConfigError(
                    f"tokenizers[{name!r}] is {type(tokenizer).__name__}, not a Tokenizer made by its constructor"
                    f"{_names_of_classes(tokenizer)}"
                )
        for name, tokenizer in tokenizers.items():
            if isinstance(tokenizer, Composite):
                self.tokenizers[name] = tokenizer.bind(tokenizers, (name,))
        self.kinds = {kind: leaf for name, t in self.tokenizers.items() for kind, leaf in leaves(name, t)}
        self.written_parts: dict[str, Written] = {}
        for name, tokenizer in self.tokenizers.items():
            check_axes(f"tokenizers[{name!r}]: axes", tokenizer.axes)
        known = dict.fromkeys(axis for tokenizer in self.tokenizers.values() for axis in tokenizer.axes)
        self.axes: tuple[str, ...] = axes or (*AXES, *(axis for axis in known if axis not in AXES))
        self._relation_numbers: dict[str, Tensor] = {}  # by kind, the number in `relations` of each of its own
        self.relations = tuple(dict.fromkeys(name for t in self.tokenizers.values() for name in t.relations))
        self.tasks: dict[str, Task] = {}
        self.patterns: dict[str, Pattern] = {}
        self.heads: dict[str, Head] = {}
        self.keys: dict[str, str] = {}
        self.answer_tokenizers: dict[str, Tokenizer] = {}
        for task in tasks:
            task = Task(task) if isinstance(task, str) else task
            pattern = Pattern.parse(task.pattern)
            pattern.check_kinds(self.tokenizers)
            if task.pattern in self.tasks:
                raise TaskError(f"task {task.pattern!r} is given twice")
            head = task.head or (Contrast() if pattern.pair else default_head(self.tokenizers[pattern.writes.kind]))
            if task.head is None and type(head) is NextToken and any(_said(self.tokenizers, f) for f in pattern.reads):
                head = NextTurn()
            pattern = head.bind(pattern)
            answers = self.tokenizers[pattern.fields[-1].kind]
            self.answer_tokenizers[task.pattern] = written = answers.written if head.autoregressive else answers
            if isinstance(written, Written):
                self.written_parts[pattern.writes.kind] = written
            head.vocab(self.answer_tokenizers[task.pattern])
            self.tasks[task.pattern] = dataclasses.replace(task, head=head)
            self.patterns[task.pattern], self.heads[task.pattern] = pattern, head
            self.keys[task.pattern] = _head_key(pattern, head)
        with torch.device("cpu"):  # samples are on the CPU, even if the model is being built on the meta device
            self.starts = {
                pattern: head.start(
                    self.keys[pattern], self.patterns[pattern].fields[-1].kind, self.answer_tokenizers[pattern]
                )
                for pattern, head in self.heads.items()
            }

    def head(self, pattern: str) -> Head:
        """The head of a task."""
        return self.heads[pattern]

    def head_key(self, pattern: str) -> str:
        """The name of the weights of a task's head; tasks that write the same kind by the same head share them."""
        return self.keys[pattern]

    def ids_of(self, kind: str) -> int | None:
        """The number of ids that content of a kind or of a part has; of a composite kind its marks. None: it has features."""
        tokenizer = self.kinds[kind].tokenizer
        return len(tokenizer.parts) if isinstance(tokenizer, Composite) else tokenizer.vocab_size

    def check_task(self, pattern: str, *, answers: bool = False) -> None:
        """Raise a TaskError unless this is one of the tasks; with answers=True, one that writes something."""
        if pattern not in self.tasks:
            raise self._no_task(pattern)
        if answers and self.patterns[pattern].written is None:
            raise self.patterns[pattern].writes_nothing()

    def _no_task(self, pattern: str) -> TaskError:
        return TaskError(
            f"there is no task {shortened(repr(pattern), 100)}; there are {', '.join(map(repr, self.tasks))}"
            f"{did_you_mean(pattern, self.tasks)}"
        )

    def __call__(
        self,
        batch: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        answers: bool = True,
        names: Sequence[str] | None = None,
        begins: Sequence[Any] | None = None,
        random: bool = False,
    ) -> Stream:
        """Pack a batch of (task, sample) as one stream.

        The value of a field may also be the Tokens that its tokenizer made of it.

        Args:
            answers: whether samples have answers, which become targets; False for prediction and the prompt of generation.
            names: what errors call each sample; None: "sample 0", "sample 1", ...
            begins: for each sample, the first tokens of its answer, from where decoding goes on; None: nothing is written yet.
            random: heads that hide tokens draw them from torch's global generator; else the value alone decides which.

        Raises:
            TaskError: an unknown task or a missing field.
            StreamError: a sample with nothing to read, or a target that cannot be learned.
            MediaError: a tokenizer cannot encode a field; the message names the sample.
        """
        if not batch:
            raise StreamError("Packer: the batch is empty")
        names = names or [f"sample {i}" for i in range(len(batch))]
        begins = begins or [None] * len(batch)
        return self.lay(
            [
                self.prepare(pattern, sample, names[i], answers=answers, begin=begins[i], random=random)
                for i, (pattern, sample) in enumerate(batch)
            ],
            answers=answers,
        )

    def prepare(
        self,
        pattern_text: str,
        values: Mapping[str, Any],
        name: str,
        *,
        answers: bool = True,
        begin: Any = None,
        random: bool = True,
    ) -> Prepared:
        """Encode one sample and lay it out by its task's head; `lay` makes a stream of several.

        Raises:
            TaskError, StreamError, MediaError: as when the packer is called.
        """
        if pattern_text not in self.tasks:
            raise self._no_task(pattern_text)
        values = self.completed(pattern_text, values, answers)
        self.patterns[pattern_text].check_sample(values, answers)
        sample = self.encoded(pattern_text, values, name, answers=answers, begin=begin, random=random)
        try:
            parts = self.heads[pattern_text].lay_out(sample)
        except StreamError as error:
            raise StreamError(f"{sample.where}: {error}") from None
        if self.most_times is not None:
            for part in parts:
                self._check_times(sample, part)
        return Prepared(pattern_text, parts, sum(tokens_of(part.segments) for part in parts))

    def _check_times(self, sample: EncodedSample, part: LaidOut) -> None:
        """Raise a StreamError for more times than the core has positions, which it would refuse without naming the sample."""
        total, most = tokens_of(part.segments), self.most_times
        sizes = torch.tensor([len(segment.tokens) for segment in part.segments])
        time_T = _positions([_Placed(0, "", part, _span(part))], part.segments, sizes, self.axes)[:, 0]
        pattern = sample.pattern
        side = list(pattern.sides.values())[part.side] if pattern.pair else pattern.reads
        counts = {f.name: len(tokens) for f in side if (tokens := sample.tokens.get(f.name)) is not None}
        if total > part.read and not pattern.pair:
            counts[pattern.answer] = total - part.read
        if not isinstance(most, tuple):
            bounds = [("has", 0, total, most)]
        else:
            bounds = [("reads", 0, part.read, most[0]), ("writes", part.read, total, most[1])]
        for does, first, last, bound in bounds:
            if bound is None or first == last:
                continue
            # the times of a writer begin anew
            times = int((time_T[first:last] - (time_T[first] if first else 0)).max().round()) + 1
            if times > bound:
                listed = ", ".join(f"{name} {count}" for name, count in counts.items())
                raise StreamError(
                    f"{sample.where}: it {does} {last - first} tokens, and the core has learned positions for {bound}; shorten it, "
                    f"because positions that were never trained mean nothing (tokens by field: {listed})"
                )

    def completed(self, pattern_text: str, values: Mapping[str, Any], answers: bool = True) -> Mapping[str, Any]:
        """A sample with its answer apart from what is read; of a chat the last turn, where no answer is given."""
        if not isinstance(values, Mapping):
            return values  # what is wrong with it `Pattern.check_sample` says
        return self.heads[pattern_text].complete(self.patterns[pattern_text], values, self.tokenizers, answers)

    def encoded(
        self,
        pattern_text: str,
        values: Mapping[str, Any],
        name: str,
        *,
        answers: bool = False,
        begin: Any = None,
        random: bool = False,
    ) -> EncodedSample:
        """A sample with the tokens of every field that its task reads, which is what `Head.lay_out` takes.

        Raises:
            MediaError: a tokenizer cannot encode a field.
        """
        pattern, where = self.patterns[pattern_text], f"{name} of task {pattern_text!r}"
        tokens = {
            field.name: encode_read(self.tokenizers[field.kind], field, values[field.name], where)
            for field in pattern.reads
        }
        if begin is not None and not answers:
            begin = encode_field(self.answer_tokenizers[pattern_text], begin, where, f"begin ({pattern.answer})")
        tokenizer, start = self.answer_tokenizers[pattern_text], self.starts[pattern_text]
        return EncodedSample(where, pattern, self.tokenizers, values, tokens, tokenizer, start, answers, begin, random)

    def prompt(self, pattern_text: str, tokens: Mapping[str, Tokens | None]) -> Stream:
        """A stream of one sample that has some of the fields of a task, given by their tokens, and no rows for a head.

        Raises:
            StreamError: every field is None.
        """
        pattern = self.patterns[pattern_text]
        tokenizer, start = self.answer_tokenizers[pattern_text], self.starts[pattern_text]
        segments = EncodedSample("", pattern, self.tokenizers, {}, tokens, tokenizer, start).read()
        read = tokens_of(segments)
        if not read:
            raise StreamError(f"task {pattern_text!r}: there is nothing to read, as every field is None")
        return self.lay([Prepared("", [LaidOut(segments, read, 0, read)], read)], answers=False)

    def lay(self, prepared: Sequence[Prepared], *, answers: bool = True) -> Stream:
        """Pack prepared samples as one stream, which reorders them by size."""
        placed = [
            _Placed(i, sample.task, part, _span(part)) for i, sample in enumerate(prepared) for part in sample.parts
        ]
        placed.sort(key=lambda p: p.span)  # neighbours of equal shape run as one batch of the fused kernel
        segments = [segment for p in placed for segment in p.part.segments]
        sizes = torch.tensor([len(s.tokens) for s in segments])
        segment_starts = sizes.cumsum(0) - sizes
        total_B = torch.tensor([p.span.total for p in placed])
        start_B = total_B.cumsum(0) - total_B
        stream_size = int(total_B.sum())

        # all tokens of a kind are one tensor, so that one call embeds them; order_T then brings the rows into the stream's order
        by_kind: dict[str, list[int]] = {}
        for i, segment in enumerate(segments):
            leaf = self.kinds.get(segment.kind)  # None: the learned tokens of a head
            by_kind.setdefault(segment.kind if leaf is None else leaf.weights, []).append(i)
        content = {kind: torch.cat([segments[i].tokens.content for i in which]) for kind, which in by_kind.items()}
        places = {
            kind: Places.of([segments[i].tokens for i in which], segments[which[0]].step)
            for kind, which in by_kind.items()
            if kind in self.reads_places
        }
        order_T = None
        if len(by_kind) > 1:
            row_T = torch.cat([ranges(segment_starts[which], sizes[which]) for which in by_kind.values()])
            order_T = torch.empty_like(row_T)
            order_T[row_T] = torch.arange(stream_size)

        sample_of_segment = torch.arange(len(placed)).repeat_interleave(
            torch.tensor([len(p.part.segments) for p in placed])
        )
        # rules see fields numbered from 0 in each sample, so that they do not depend on the pack; parts of a value share a number
        number = torch.tensor([not s.continues for s in segments]).cumsum(0)
        number -= number[torch.searchsorted(sample_of_segment, sample_of_segment)]
        info = MaskInfo(
            sample=torch.arange(len(placed), dtype=torch.int32).repeat_interleave(total_B),
            order=torch.arange(stream_size, dtype=torch.int32) - start_B.int().repeat_interleave(total_B),
            bidirectional=torch.tensor([s.bidirectional for s in segments], dtype=torch.int32).repeat_interleave(sizes),
            segment=number.int().repeat_interleave(sizes),
            links=self._links(segments, segment_starts.tolist(), stream_size),
        )
        return Stream(
            content=content,
            order_T=order_T,
            position_TA=_positions(placed, segments, sizes, self.axes),
            layout=Layout(tuple(p.span for p in placed), info),
            readings=self._readings(placed, start_B.tolist(), answers),
            places=places,
        )

    def _links(self, segments: list[Segment], starts: list[int], stream_size: int) -> Links | None:
        """The relations of the tokens of a stream, from the pairs of each segment and the row at which it starts."""
        if not self.relations:
            return None
        found = []
        for segment, start in zip(segments, starts, strict=True):
            pairs = segment.tokens.pairs
            if pairs is not None and len(pairs):
                if (number := self._relation_numbers.get(segment.kind)) is None:
                    names = self.kinds[segment.kind].tokenizer.relations
                    number = self._relation_numbers[segment.kind] = torch.tensor(list(map(self.relations.index, names)))
                found.append(torch.stack([pairs[:, 0] + start, pairs[:, 1] + start, number[pairs[:, 2]]], 1))
        return linked(torch.cat(found), stream_size, self.relations) if found else None

    def _readings(self, placed: list[_Placed], starts: list[int], answers: bool) -> dict[str, Reading]:
        """By task, the rows that its head reads and their targets."""
        readings = {}
        for pattern in self.tasks:
            mine = [(p, start) for p, start in zip(placed, starts, strict=True) if p.task == pattern]
            if not mine:
                continue
            pair = self.patterns[pattern].written is None
            if pair:  # the loss compares row i of the left sides with row i of the right sides
                mine.sort(key=lambda m: (m[0].part.side, m[0].sample))
            parts = [p.part for p, _ in mine]
            first = torch.tensor([start + p.part.first for p, start in mine])
            lengths = [part.last - part.first if part.row_N is None else len(part.row_N) for part in parts]
            targets = [part.target for part in parts if part.target is not None]
            keys = [p.part.key_N + start for p, start in mine if p.part.key_N is not None]
            pointed = [part.pointed_N for part in parts if part.pointed_N is not None]
            readings[pattern] = Reading(
                row_N=torch.cat([p.part.rows_N + start for p, start in mine])
                if any(part.row_N is not None for part in parts)
                else ranges(first, torch.tensor(lengths)),
                lengths=tuple(lengths),
                samples=tuple(p.sample for p, _ in mine),
                target=torch.cat(targets) if answers else None,
                target_lengths=tuple(len(t) for t in targets),
                key_N=torch.cat(keys) if keys else None,
                key_lengths=tuple(map(len, keys)),
                pointed_N=torch.cat(pointed) if pointed else None,
                pointed_lengths=tuple(map(len, pointed)),
                hidden=() if answers else tuple(part.hidden for part in parts if part.hidden is not None),
                left=sum(part.side == 0 for part in parts) if pair else None,
            )
        return readings


def _names_of_classes(given: Any) -> str:
    """The repair for names of classes in the place of a tokenizer; '' for anything else."""
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) for name in given):
        return ""
    listed = ", ".join(map(repr, given[:3])) + (", .." if len(given) > 3 else "," if len(given) == 1 else "")
    return f"; names of classes are multimodal_tokenizers.Labels(({shortened(listed, 100)}))"


def _positions(placed: list[_Placed], segments: list[Segment], sizes: Tensor, axes: tuple[str, ...]) -> Tensor:
    """Positions (T, A) in steps on these axes; time 0 of each field is one step after the last token of the field before it."""
    if axes == AXES:  # one division for all, as segments are many and short
        step = torch.tensor([s.step for s in segments]).repeat_interleave(sizes, 0)
        position_TA = torch.cat([s.tokens.position_NA for s in segments]) / step
    else:
        position_TA = torch.cat([s.position(axes) for s in segments])
    last = torch.segment_reduce(position_TA[:, 0].contiguous(), "max", lengths=sizes).tolist()
    offsets, at = [], 0
    for p in placed:
        # by segment that begins a time of its own, one step after its last token; tokens hidden within a segment share its time
        ends: dict[int, float] = {}
        for i, segment in enumerate(p.part.segments):
            i = i if segment.within is None else segment.within
            end = round(last[at], 3) + 1.0  # 14.999999 is 15: seconds divided by a step are seldom whole
            ends[i] = max(end, ends[i]) if i in ends else end
            at += 1
        gaps = [p.part.segments[i].gap for i in ends]
        before = accumulate([0.0, *ends.values()])
        starts = {i: time + gap for i, time, gap in zip(ends, before, accumulate(gaps), strict=False)}
        offsets += [starts[i if s.within is None else s.within] for i, s in enumerate(p.part.segments)]
    position_TA[:, 0] += torch.tensor(offsets).repeat_interleave(sizes)
    return position_TA


def _head_key(pattern: Pattern, head: Head) -> str:
    """A name without the fields' names, so that tasks over the same kinds share one readout; it is part of the weights' names."""
    sides = pattern.sides.values() if pattern.pair else [[pattern.writes]]
    kinds = "__".join("_".join(field.kind for field in side) for side in sides)
    return f"{kinds}_{weights_class(head).__name__}"


def _said(tokenizers: Mapping[str, Tokenizer], field: Field) -> bool:
    """Whether a field holds what the answering side said earlier, as a chat does."""
    tokenizer = tokenizers[field.kind]
    return isinstance(tokenizer, Composite) and tokenizer.said is not None
