"""The contract of heads: how a sample is laid out, which states are read, and what loss and answers are computed from them."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.composite import Composed, Composite, Several
from multimodal.declare import Declared
from multimodal.norm import product
from multimodal.notebook import prediction_html
from multimodal.old_names import warn
from multimodal.pattern import Field, Pattern
from multimodal.positions import in_steps, on_axes
from multimodal.shapes import AXES, ConfigError, MediaError, StreamError, TaskError
from multimodal.texts import shortened
from multimodal.tokenizer import AfterEncoding, Tokenizer, Tokens, at_times, describe


@dataclass(frozen=True)
class Prediction:
    """An answer, its probability, and the probability of every class if there are classes.

    Probabilities are the model's own and not calibrated: with `label_smoothing=s` over V classes a model is trained to give its
    answer a probability of at most 1 - s + s / V (91 % for ten classes and 0.1).

    value: the answer, as the kind's `decode` returns it.
    confidence: the probability of the answer under the model, from 0 to 1.
    probability: by name of a class, its probability; empty if there are no classes.
    ended: why writing ended: stop, stop string, length (the fixed one of this kind), or max_tokens.
    tokens: the written tokens; None if the head is not autoregressive.
    others: the other answers of a beam search, from the second best on.

    Examples:
        >>> answer = model.predict("image -> label", image=square)
        >>> answer.value, answer.confidence > 0.9, sorted(answer.probability)
        ('square', True, ['circle', 'square'])
    """

    value: Any
    confidence: float
    probability: dict[str, float] = dataclasses.field(default_factory=dict, repr=False)
    ended: str = "stop"
    tokens: Tokens | None = dataclasses.field(default=None, repr=False, compare=False)
    others: "tuple[Prediction, ...]" = dataclasses.field(default=(), repr=False)

    @property
    def complete(self) -> bool:
        """Whether the answer ended by itself; False if max_tokens cut it off."""
        return self.ended != "max_tokens"

    def __str__(self) -> str:
        return str(self.value)

    def _repr_html_(self) -> str:
        """For notebooks: the answer, and a bar for each of the most probable classes."""
        return prediction_html(self.value, self.confidence, self.probability)


@dataclass
class Segment:
    """Consecutive tokens of one kind in a sample: a field that is read, the learned tokens of a head, or an answer.

    kind: the name of the tokenizer, or "head:NAME" for learned tokens.
    tokens: its tokens.
    step: the distance on each axis that is one step of its positions; 1 on axes behind its last number.
    bidirectional: whether its tokens attend to each other in both directions; else each attends to those before it.
    within: the index of the segment in whose time its positions are; None: its time starts after the segments before it.
    axes: the names of the axes of its positions.
    continues: whether it is a further part of the value that the segment before it is of; both have one number for mask rules.
    gap: steps of time that are left free before it, so that values of one list do not run together.
    """

    kind: str
    tokens: Tokens
    step: tuple[float, ...]
    bidirectional: bool
    within: int | None = None
    axes: tuple[str, ...] = AXES
    continues: bool = False
    gap: float = 0.0

    def position(self, axes: tuple[str, ...]) -> Tensor:
        """The positions (N, A) of its tokens in steps, on the axes of a core.

        Raises:
            StreamError: the positions have other axes than the segment says.
        """
        position_NA = self.tokens.position_NA
        if position_NA.shape[1] != len(self.axes):
            raise StreamError(
                f"the tokens of {self.kind!r} have positions {tuple(position_NA.shape)}, but their segment has the axes "
                f"{', '.join(self.axes)}; make it with Segment(.., axes=tokenizer.axes)"
            )
        return on_axes(in_steps(position_NA, self.step), self.axes, axes)


@dataclass
class EncodedSample:
    """One sample of a task with its fields encoded: the input of `Head.lay_out`.

    where: the name of the sample in errors, such as "sample 0 of task 'image -> label'".
    pattern: the pattern of the task.
    tokenizers: by name of a kind, its tokenizer.
    values: the sample as it was given; its answer is encoded when `answer` is called.
    tokens: by name of a field that is read, its tokens; None or no entry: the sample does not have it.
    tokenizer: that of the written field; for a pair, that of its last field.
    start: the tokens between what is read and what is written, such as the learned tokens of the head; it may be empty.
    learn: whether the sample has an answer, which becomes the target.
    begin: the first tokens of the answer, from where decoding goes on; None: nothing is written yet.
    random: whether a head that hides tokens draws the hidden ones at random; else they are a function of the value.
    """

    where: str
    pattern: Pattern
    tokenizers: Mapping[str, Tokenizer]
    values: Mapping[str, Any]
    tokens: Mapping[str, Tokens | None]
    tokenizer: Tokenizer
    start: Segment
    learn: bool = False
    begin: Tokens | None = None
    random: bool = False

    def read(self, fields: Iterable[Field] | None = None) -> list[Segment]:
        """The segments of the fields that are read (or of some of them), as far as the sample has them."""
        segments = []
        for field in self.pattern.reads if fields is None else fields:
            tokens, tokenizer = self.tokens.get(field.name), self.tokenizers[field.kind]
            if tokens is not None:
                segments += value_segments(field.kind, tokens, tokenizer)
        return segments

    def read_of_kind(self) -> tuple[Tokens, Tensor]:
        """All tokens that are read and are of the written kind, concatenated, and their rows (N,) in the sample."""
        found, rows, start = [], [], 0
        for segment in self.read():
            stop = start + len(segment.tokens)
            if segment.kind == self.pattern.writes.kind:
                found.append(segment.tokens)
                rows.append(torch.arange(start, stop))
            start = stop
        if len(found) == 1:
            return found[0], rows[0]
        if not found:
            return Tokens(torch.empty(0), torch.empty(0, len(self.tokenizer.axes))), torch.empty(0, dtype=torch.long)
        content, position_NA = torch.cat([t.content for t in found]), torch.cat([t.position_NA for t in found])
        return Tokens(content, position_NA), torch.cat(rows)

    def answer(self) -> Tokens:
        """The tokens of the target.

        Raises:
            StreamError: the answer should be the target, but is None.
        """
        name, tokenizer = self.pattern.answer, self.tokenizer
        if self.values[name] is None:
            nothing = " ('' is an answer too: nothing is written)" if tokenizer.text else ""
            raise StreamError(
                f"field {name!r} is None, that is not given, but it is what is learned; "
                f"give its value{nothing}, or leave this sample out"
            )
        return encode_field(tokenizer, self.values[name], self.where, name, empty=True)

    def written(self, tokens: Tokens) -> Segment:
        """The segment of an answer, whose tokens are causal. They have no relations, as these are not known while it is written."""
        tokens = tokens if tokens.pairs is None else Tokens(tokens.content, tokens.position_NA)
        return Segment(self.pattern.writes.kind, tokens, self.tokenizer.step, False, axes=self.tokenizer.axes)


def tokenizer_of(tokenizers: Mapping[str, Tokenizer], kind: str) -> Any:
    """The tokenizer of a segment's kind; of "page.words" that of this part of the kind "page"."""
    name, _, part = kind.partition(".")
    tokenizer: Any = tokenizers[name]
    return tokenizer.at(part) if part else tokenizer


def value_segments(kind: str, tokens: Tokens, tokenizer: Tokenizer) -> list[Segment]:
    """The segments of a field's value that is read: one, of a composite one for each run, and those of each value of a list."""
    if isinstance(tokens, Several):
        values = [value_segments(kind, value, tokenizer) for value in tokens.values if len(value)]
        for value in values[1:]:
            value[0].gap = 1.0
        return [segment for value in values for segment in value]
    if not isinstance(tokens, Composed):
        return [Segment(kind, tokens, tokenizer.step, not tokenizer.causal, axes=tokenizer.axes)]
    assert isinstance(tokenizer, Composite)
    segments = []
    for i, (path, run) in enumerate(tokens.runs):
        part = tokenizer.at(path)
        axes = AXES if isinstance(part, Composite) else part.axes  # the tokens of a composite itself are its marks
        free = not tokenizer.causal
        segments.append(Segment(f"{kind}.{path}".rstrip("."), run, part.step, free, axes=axes, continues=i > 0))
    return segments


def encode_read(tokenizer: Tokenizer, field: Field, value: Any, where: str) -> Tokens | None:
    """The tokens of a field that is read; None where the sample does not have it. With a star its value is a list.

    Raises:
        MediaError: the tokenizer cannot encode a value; the message names the sample and the field.
    """
    if value is None or (field.many and isinstance(value, Several)):
        return value
    if not field.many:
        return encode_field(tokenizer, value, where, field.name)
    if not isinstance(value, (list, tuple)):
        raise MediaError(
            f"{where}, field {field.name!r}: '{field.kind}*' takes a list of values, also an empty one, not {describe(value)}"
        )
    found = [encode_field(tokenizer, each, where, f"{field.name}[{i}]") for i, each in enumerate(value)]
    return Several(found, tokenizer.step)


def encode_field(tokenizer: Tokenizer, value: Any, where: str, name: str, *, empty: bool = False) -> Tokens:
    """The tokens of a field's value, which may be Tokens already.

    empty: accept a value without tokens.

    Raises:
        MediaError: the tokenizer cannot encode the value; the message names the sample and the field.
    """
    if isinstance(value, Tokens):
        return value
    if isinstance(value, AfterEncoding):
        return value.encoded(tokenizer, encode_field(tokenizer, value.value, where, name, empty=empty))
    try:
        return tokenizer(value, empty=empty)
    except ValueError as error:
        raise MediaError(f"{where}, field {name!r}: {shortened(error, 500)}") from error


@dataclass
class LaidOut:
    """One sample of the stream: its segments, the rows that its head reads, and their target.

    segments: its tokens, in order; the context comes first.
    read: number of tokens of the context.
    first, last: the head reads the rows from `first` to before `last`, counted in this sample.
    row_N: those of these rows that the head reads, in ascending order; None: all of them.
    target: what the loss compares with; None: nothing is learned.
    key_N: for a pointer, the rows at which it may point.
    pointed_N: for a pointer, the index in `key_N` of each written token.
    side: for a pair, 0 for the left side and 1 for the right one.
    hidden: for a head that hides tokens, all tokens of the value and which of them (N,) are hidden.
    """

    segments: list[Segment]
    read: int
    first: int
    last: int
    target: Tensor | None = None
    key_N: Tensor | None = None
    pointed_N: Tensor | None = None
    side: int = 0
    hidden: tuple[Tokens, Tensor] | None = None
    row_N: Tensor | None = None

    @property
    def rows_N(self) -> Tensor:
        """The rows that the head reads, counted in this sample."""
        return torch.arange(self.first, self.last) if self.row_N is None else self.row_N


@dataclass(frozen=True)
class Reading:
    """The rows of a stream that the head of one task reads, and their targets.

    row_N: the rows, sample after sample.
    lengths: by sample, the number of its rows.
    samples: by sample, its number in the batch.
    target: the targets, sample after sample; None: the stream was packed without answers.
    target_lengths: by sample, the number of its targets.
    key_N: for a pointer, the rows at which it may point.
    key_lengths: by sample, the number of these rows.
    pointed_N: for a pointer, the index of each written token among the sample's keys.
    pointed_lengths: by sample, the number of its written tokens.
    left: for a pair, the number of rows of left sides, which come first; right sides follow in the same order of samples.
    hidden: for a head that hides tokens, by sample its tokens and which of them (N,) are hidden; on the host, and only without
        answers.
    """

    row_N: Tensor
    lengths: tuple[int, ...]
    samples: tuple[int, ...]
    target: Tensor | None
    target_lengths: tuple[int, ...]
    key_N: Tensor | None = None
    key_lengths: tuple[int, ...] = ()
    pointed_N: Tensor | None = None
    pointed_lengths: tuple[int, ...] = ()
    left: int | None = None
    hidden: tuple[tuple[Tokens, Tensor], ...] = ()

    @property
    def count(self) -> int:
        """Number of targets."""
        return sum(self.target_lengths)


class TiedLinear(nn.Module):
    """The linear layer of a readout whose weight is the table of an embedding: logits are products with the embedded symbols.

    The table belongs to the embedding, so this module neither stores nor saves it.
    """

    table: Any  # an nn.Embedding, or the QuantizedTable in its place

    def __init__(self, table: nn.Embedding, bias: bool) -> None:
        super().__init__()
        self.table = table
        self.bias = nn.Parameter(torch.zeros(table.num_embeddings)) if bias else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "table":  # past nn.Module, which would make it a part of this module too
            self.__dict__["table"] = value
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    @property
    def out_features(self) -> int:
        return self.table.num_embeddings

    def forward(self, state_ND: Tensor) -> Tensor:
        if isinstance(self.table, nn.Embedding):
            return product(state_ND, self.weight, self.bias)
        logits_NV = self.table.product(state_ND)  # a smaller table multiplies itself
        return logits_NV if self.bias is None else logits_NV + self.bias


def tied_linear(head: Any, embedding: nn.Module) -> TiedLinear:
    """The linear layer of a head with `tied` and `bias`, whose weight is the table of this embedding.

    Raises:
        ConfigError: the embedding is no table.
    """
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"{type(head).__name__}: tied=True needs an embedding that is a table (nn.Embedding), not "
            f"{type(embedding).__name__}"
        )
    return TiedLinear(embedding, head.bias)


class Readout(nn.Module):
    """The module of a head: a linear layer onto the vocabulary, and `queries` learned tokens that precede what is written."""

    linear: nn.Linear | TiedLinear

    def __init__(self, width: int, vocab: int, queries: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab, bias)
        nn.init.normal_(self.linear.weight, std=0.02)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02) if queries else None
        self.pool: nn.Module | None = None  # of a head that pools states

    def last_layers(self) -> list[nn.Module]:
        """The layers that end it, which `mm.quantize` makes smaller."""
        return [self.linear] if hasattr(self, "linear") else []


GatherRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""(vectors (N, F), targets (N, 2)) of this process -> those of all processes, (M, F) with gradients and (M, 2), and where its own
begin."""


class Head(Declared, ABC):
    """How an answer is computed from the states of the stream, and its loss. Subclass as a frozen dataclass.

    queries: number of learned tokens, whose states the head reads; with 0 it reads the states of the context.
    autoregressive: whether it writes token by token: in training the causal tokens of the answer follow the learned ones (teacher
    forcing), and `Model.generate` decodes it.
    measures: names of the measures on held-out data.
    smallest_batch: the least number of samples in a micro-batch for which its loss is defined.
    gathers: whether it compares samples, and its `state_loss` takes `gather`, which adds those of other processes.
    draws_features: whether it writes features, drawn by `draw`, and not ids chosen by their logits; true where `draw` is written.
    shares: the class of heads whose weights it shares where both write one kind; None: its own.
    """

    queries: ClassVar[int] = 0
    autoregressive: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("loss", "exact")
    smallest_batch: ClassVar[int] = 1
    gathers: ClassVar[bool] = False
    draws_features: ClassVar[bool] = False
    shares: ClassVar["type[Head] | None"] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own, name = vars(cls), cls.__name__
        if "draws_features" not in own:
            cls.draws_features = bool(own.get("continuous", cls.draw is not Head.draw))
        if cls.draws_features and cls.measures == Head.measures:
            cls.measures = ("loss",)  # features are never exactly right; the loss measures their distance
        # the flags of version 0.1; this goes with 0.3
        for old, new in (("writes", "autoregressive"), ("continuous", "draws_features")):
            if old in own:
                warn(f"{name}.{old}", f"{name}.{new}", 2)
        if "writes" in own:
            cls.autoregressive = bool(own["writes"])
        for old, new in (("hides", "lay_out"), ("points", "source and next_logits"), ("pairs", "bind and lay_out")):
            if own.get(old):
                raise ConfigError(f"{name}: {old}=True is of version 0.1; a head of this sort now overrides {new}")

    def bind(self, pattern: Pattern) -> Pattern:
        """Check the pattern of a task for this head, and return it with what the head adds.

        Raises:
            TaskError: this head cannot answer such a task.
        """
        if pattern.pair:
            raise wrong_arrow(pattern, self)
        if not pattern.reads and not self.queries:
            raise TaskError(
                f"task {pattern.text!r} reads nothing, and {type(self).__name__} answers only from what was read"
            )
        return pattern

    def complete(
        self, pattern: Pattern, values: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer], answers: bool
    ) -> Mapping[str, Any]:
        """A sample with its answer apart from what is read, for a head that finds it there; by default as it is.

        answers: whether samples have answers, which are learned.
        """
        return values

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """The segments of a sample, the rows that this head reads, and their target; a pair returns one for each side.

        The context comes first, then the learned tokens, then, if the head is autoregressive, the answer.

        Raises:
            StreamError: nothing to read, or a target that cannot be learned; the packer adds the name of the sample.
            TaskError: the sample has the beginning of an answer, but this head is not autoregressive.
        """
        segments = sample.read()
        read = tokens_of(segments)
        if sample.pattern.reads and not read and not self.autoregressive:
            nothing = "None or an empty list" if any(field.many for field in sample.pattern.reads) else "None"
            raise StreamError(
                f"every field that is read is {nothing}; give at least one, as {type(self).__name__} answers only from what was "
                "read"
            )
        if sample.begin is not None and not self.autoregressive:
            raise TaskError(
                f"task {sample.pattern.text!r}: {type(self).__name__} answers at once; there is nothing to begin"
            )
        if len(sample.start.tokens):
            segments.append(sample.start)
        answer, target = sample.begin, None
        if sample.learn:
            answer = sample.answer()
            target = self.target(answer, read, sample.tokenizer)
        if self.autoregressive and answer is not None and len(answer):
            segments.append(sample.written(answer))
        # a head with learned tokens reads their rows and those of the answer; others read the context
        first, last = (read, tokens_of(segments)) if self.queries else (0, read)
        return [LaidOut(segments, read, first, last, target)]

    def start(self, key: str, kind: str, tokenizer: Tokenizer) -> Segment:
        """The tokens between what is read and what is written: by default the learned tokens of the head with these weights.

        key: the name of the head's weights. kind, tokenizer: of the written field.
        """
        time_N = torch.arange(self.queries)
        return Segment("head:" + key, Tokens(time_N, at_times(time_N)), (1.0, 1.0, 1.0), False)

    def tie(self, readout: Readout, embedding: nn.Module) -> None:
        """Let the readout use the weights of the embedding of the written kind; by default it does not."""

    def stop(self, tokenizer: Tokenizer) -> int:
        """The id that ends an answer, for a head that is autoregressive: by default the last of its logits."""
        return self.vocab(tokenizer) - 1

    def check_core(self, pattern: str, core: Any) -> None:
        """Raise a ConfigError if a task of this head cannot be answered with this core."""

    @abstractmethod
    def vocab(self, tokenizer: Tokenizer) -> int:
        """V, the width of the logits.

        Raises:
            ConfigError: this head cannot write values of this tokenizer.
        """

    @abstractmethod
    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """The logits (N, V) of the states of the rows that this head reads; `lengths` is the number of rows of each sample."""

    @abstractmethod
    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        """The sum of the losses of all targets, in nats."""

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        """The loss as a function of the states; override it if the loss needs more than logits, or can avoid computing them."""
        return self.loss(self.logits(readout, state_ND, lengths), lengths, target, target_lengths)

    def divisor(self, target: Tensor, target_lengths: Sequence[int]) -> float:
        """What the sum of these targets' losses is divided by for their mean: their number, or the sum of their weights."""
        return sum(target_lengths)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of each row (N,), in nats, if there is one target for each row; `Hard` attention learns from it.

        Raises:
            ConfigError: this head has no loss of single rows.
        """
        raise ConfigError(
            f"{type(self).__name__}: a Hard read is learned from the loss of each row, which this head does not give; use Soft "
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
        """Sample the next features (N, F) of a continuous head, and the logit (N,) of stopping; a function of the noise.

        noise_NF: standard normal noise. temperature: factor of this noise.
        guide_ND: the states of the same samples without their context; the samples are moved away from theirs by `guidance`.

        Raises:
            ConfigError: this head does not write features.
        """
        raise ConfigError(f"{type(self).__name__} writes no features")

    def inputs(self, reading: Reading, state_TD: Tensor) -> dict[str, Any]:
        """Further keyword arguments of `logits` and `state_loss`, besides the rows of a reading."""
        return {}

    def absent_loss(self, state_TD: Tensor, gather: GatherRows) -> Tensor:
        """The loss, 0, of a stream without a sample of its task, where `gathers`: it gathers nothing, while others gather theirs.

        state_TD: the states of the stream, for their type and device.
        """
        raise NotImplementedError(f"{type(self).__name__}: a head that gathers writes absent_loss")

    def answer_inputs(self, reading: Reading, position_TA: Tensor) -> dict[str, Any]:
        """Further keyword arguments of `answer`, besides the rows of a reading: by default what the head had hidden, if it does so.

        position_TA: the positions of the stream, in steps on the core's axes.
        """
        return {"hidden": reading.hidden} if reading.hidden else {}

    def source(self, sample: EncodedSample) -> Tokens | None:
        """The tokens of the context among which the head chooses by their index, as a pointer does; None: it chooses ids."""
        return None

    def choices(self, tokens: Tokens, source: Tokens | None) -> list[int]:
        """What the head would choose to write these tokens: their ids, or indices in `source`; empty for features."""
        return [] if self.draws_features else tokens.content.tolist()

    def next_logits(
        self, readout: Readout, state_ND: Tensor, sources: Sequence[Tensor], chosen: Sequence[Sequence[int]]
    ) -> Tensor:
        """The logits (N, V) of the next token of N answers, from the newest state of each.

        sources: by answer, the states (M, D) of its `source`. chosen: by answer, what was chosen so far.
        """
        return self.logits(readout, state_ND, [1] * len(state_ND))

    def forbidden(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that are never written, and those that do not begin an answer."""
        return (), ()

    def check_decoding(self, where: str, options: Any, prefix: Any) -> None:
        """Raise a ConfigError for options of `Model.generate` that do not apply to this head."""
        if self.draws_features and (options.beams > 1 or options.sampler is not None):
            raise ConfigError(f"{where}: {type(self).__name__} writes features; beams and samplers choose among tokens")

    @abstractmethod
    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        """The answer of each sample."""

    def wanted(self, value: Any, tokenizer: Tokenizer) -> Any:
        """The answer that the measure "exact" compares with, from what a sample has: by default `Tokenizer.wanted` of it."""
        return tokenizer.wanted(value)

    def right_rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """By row (N,), how many of its answers are right, and how many are known, for a head whose `measures` have "rows"."""
        raise ConfigError(f"{type(self).__name__} does not say which rows are right; take 'rows' out of its measures")

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        """The targets of the loss, from the tokens of an answer; this runs in the data workers.

        rows: number of rows of the context.

        Raises:
            StreamError: this answer cannot be learned, for instance because it has more tokens than there are rows.
        """
        return tokens.content

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        """Make the module of this head, for a core of this width."""
        return Readout(width, self.vocab(tokenizer), self.queries)


def weights_class(head: Head) -> type[Head]:
    """The class by which the weights of a head are named: its own, or the one that it shares them with."""
    return head.shares or type(head)


def computes_as(head: Head, kind: type[Head]) -> bool:
    """Whether a head inherits the logits and the loss of this class, so that a faster path computes the same."""
    return type(head).loss is kind.loss and type(head).logits is kind.logits


def vocabulary(head: Head, tokenizer: Tokenizer) -> int:
    """The number of symbols, for a head that writes sequences of them.

    Raises:
        ConfigError: values of this tokenizer are classes, or have no vocabulary.
    """
    if tokenizer.vocab_size is None or tokenizer.classes:
        what = "its values are classes; use Classify" if tokenizer.classes else "it has no vocabulary"
        raise ConfigError(
            f"{type(head).__name__} writes symbol after symbol, which {type(tokenizer).__name__} is not: {what}"
        )
    return tokenizer.vocab_size


def class_count(head: Head, tokenizer: Tokenizer) -> int:
    """The number of classes, as ids or as features; a ConfigError if there are neither."""
    classes = tokenizer.vocab_size or tokenizer.feature_size
    if not classes:
        raise ConfigError(
            f"{type(head).__name__}: {type(tokenizer).__name__} declares no vocab_size or feature_size to choose from"
        )
    return classes


def check_length(head: Head, tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Raise a StreamError unless an answer has the fixed length of its kind, if there is one."""
    if tokenizer.length not in (None, len(tokens)):
        raise StreamError(
            f"{type(head).__name__}: the answer has {len(tokens)} tokens, but every written {type(tokenizer).__name__} has "
            f"{tokenizer.length}; bring it to that size first"
        )


def wrong_arrow(pattern: Pattern, head: Head) -> TaskError:
    """The error of a pair whose head is none for pairs, and the other way round."""
    return TaskError(
        f"task {pattern.text!r}: '<->' needs a head for pairs, such as Contrast, and such a head needs '<->', but the head is "
        f"{type(head).__name__}"
    )


def ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, .., start + size - 1 of each, concatenated: (sum of sizes,)."""
    within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return starts.repeat_interleave(sizes) + within


def check_smoothing(head: Any) -> None:
    """Raise a ConfigError unless a head's `label_smoothing` is from 0 to below 1."""
    if not 0 <= head.label_smoothing < 1:
        raise ConfigError(f"{type(head).__name__}: label_smoothing={head.label_smoothing} is not in 0 to 1")


def tokens_of(segments: Iterable[Segment]) -> int:
    """The number of tokens of segments."""
    return sum(len(segment.tokens) for segment in segments)
