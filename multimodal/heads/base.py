"""The contract of heads: where a sample's tokens go, which states are read, what is learned from them and what is answered."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.norm import is_untouched
from multimodal.notebook import prediction_html
from multimodal.old_names import warn
from multimodal.pattern import Field, Pattern
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens

CHUNK = 2**20  # numbers of the logits that are there at the same time: on CPUs what stays in their caches
CHUNK_CUDA = 2**27  # there a matrix must be large to be multiplied at full speed


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

    Examples:
        >>> answer = model.predict("image -> label", image=square)
        >>> answer.value, answer.confidence > 0.9, sorted(answer.probability)
        ('square', True, ['circle', 'square'])
    """

    value: Any
    confidence: float
    probability: dict[str, float] = dataclasses.field(default_factory=dict, repr=False)
    ended: str = "stop"  # what ended the writing: stop, stop string, length (this kind has a fixed one), max_tokens
    tokens: Tokens | None = dataclasses.field(default=None, repr=False, compare=False)  # what was written
    others: "tuple[Prediction, ...]" = dataclasses.field(
        default=(), repr=False
    )  # from the second best on, of a beam search

    @property
    def complete(self) -> bool:
        """False: writing was ended by max_tokens before the head chose to stop."""
        return self.ended != "max_tokens"

    def __str__(self) -> str:
        return str(self.value)

    def _repr_html_(self) -> str:
        """For notebooks: the answer, and a bar for each of the most probable classes."""
        return prediction_html(self.value, self.confidence, self.probability)


@dataclass
class Segment:
    """Tokens of one kind, end to end in a sample: a field that is read, learned tokens of a head, or an answer.

    kind: the tokenizer's name, or "head:..." for learned tokens.
    step: how much of (time, row, column) is one step of its positions.
    bidirectional: whether its tokens see each other, or each only what came before it.
    within: the number of the segment whose time it shares; None: it comes after all before it.
    """

    kind: str
    tokens: Tokens
    step: tuple[float, float, float]
    bidirectional: bool
    within: int | None = None


@dataclass
class EncodedSample:
    """One sample of a task, encoded: what a head lays out.

    where: what errors call it, such as "sample 0 of task 'image -> label'".
    values: the sample as it was given; the answer among them is encoded when the head asks for it.
    tokens: by field read, its tokens; None or absent: the sample lacks it.
    tokenizer: that of the written kind; of a pair, of its last field.
    start: the head's learned tokens.
    learn: whether the answer is known and to be learned.
    begin: the first tokens of the answer, if it is written from there on.
    random: whether a head that hides tokens draws anew which ones; else the same value is hidden alike every time.
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
        """The segments of the fields read (or of some of them), without those that the sample lacks."""
        segments = []
        for field in self.pattern.reads if fields is None else fields:
            tokens, tokenizer = self.tokens.get(field.name), self.tokenizers[field.kind]
            if tokens is not None:
                segments.append(Segment(field.kind, tokens, tokenizer.step, not tokenizer.causal))
        return segments

    def read_of_kind(self) -> tuple[Tokens, Tensor]:
        """All tokens read of the kind that is written, end to end, and their rows (N,) in the sample."""
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
            return Tokens(torch.empty(0), torch.empty(0, 3)), torch.empty(0, dtype=torch.long)
        content, position_NA = torch.cat([t.content for t in found]), torch.cat([t.position_NA for t in found])
        return Tokens(content, position_NA), torch.cat(rows)

    def answer(self) -> Tokens | None:
        """The tokens to be learned, or those that the answer begins with; None: nothing is written yet.

        Raises:
            StreamError: the answer is to be learned, and is None.
        """
        if not self.learn:
            return self.begin
        name, tokenizer = self.pattern.answer, self.tokenizer
        if self.values[name] is None:
            nothing = " ('' is an answer too: nothing is written)" if tokenizer.text else ""
            raise StreamError(
                f"field {name!r} is None, that is not given, but it is what is learned; "
                f"give its value{nothing}, or leave this sample out"
            )
        return encode_field(tokenizer, self.values[name], self.where, name, empty=True)

    def written(self, tokens: Tokens) -> Segment:
        """The segment of an answer, each of whose tokens sees those before it."""
        return Segment(self.pattern.writes.kind, tokens, self.tokenizer.step, False)


def encode_field(tokenizer: Tokenizer, value: Any, where: str, name: str, *, empty: bool = False) -> Tokens:
    """The tokens of one value of one field; only with `empty` may there be none.

    Raises:
        MediaError: says where the value stands.
    """
    if isinstance(value, Tokens):
        return value
    try:
        return tokenizer(value, empty=empty)
    except ValueError as error:
        raise MediaError(f"{where}, field {name!r}: {shortened(error, 500)}") from error


@dataclass
class LaidOut:
    """One sample of the stream: its segments, the rows that its head reads, and what they should say.

    read: tokens of the context, which come first. first: the first row that the head reads; it reads all from there to `last`.
    target: what is learned; None: nothing is.
    key_N, pointed_N: of a pointer, the rows it may point at, and which of these each written token is.
    side: of a pair, 0 for the left side and 1 for the right one.
    hidden: of a head that hides tokens, the whole value and which of its tokens (N,) are hidden.
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


@dataclass(frozen=True)
class Reading:
    """What one task's head reads of a stream.

    row_N: rows of the stream, sample after sample.
    lengths: number of rows of each sample.
    samples: which sample of the batch each is.
    target: what should be answered; None: it is not known.
    target_lengths: number of targets of each sample.
    key_N: of a pointer, the rows that it may point at.
    key_lengths: number of these of each sample.
    pointed_N: of a pointer, which of its keys each written row is.
    pointed_lengths: number of written rows of each sample.
    left: of a pair, the number of rows of left sides; they come first, and the right ones follow in the same order of samples.
    hidden: of a head that hides tokens, each sample's tokens and which of them (N,) are hidden; on the host, without answers only.
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


class Readout(nn.Module):
    """The learnable half of a head: a linear layer onto the vocabulary, and the learned tokens that open a written segment."""

    def __init__(self, width: int, vocab: int, queries: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02) if queries else None


class Head(Declared, ABC):
    """How one kind of answer is read off the stream and learned. Subclass as a frozen dataclass.

    queries: number of learned tokens that the head reads; with none it reads the states of the context.
    autoregressive: whether it writes token by token: the answer's tokens follow the learned ones in the stream, each seeing those
    before it (teacher forcing), and `Model.generate` decodes it.
    measures: what held-out data are measured by, beside what it is compared with.
    smallest_batch: samples of one micro-batch that its loss needs.
    """

    queries: ClassVar[int] = 0
    autoregressive: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("loss", "exact")
    smallest_batch: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "writes" in vars(cls):  # goes with version 0.3
            warn(f"{cls.__name__}.writes", f"{cls.__name__}.autoregressive", 2)
            cls.autoregressive = bool(vars(cls)["writes"])

    def bind(self, pattern: Pattern) -> Pattern:
        """The pattern of a task as this head uses it.

        Raises:
            TaskError: this head cannot answer such a task.
        """
        if pattern.pair:
            raise TaskError(
                f"task {pattern.text!r}: '<->' wants a head that tells which two belong together, such as Contrast, and those "
                f"want '<->', but the head is {type(self).__name__}"
            )
        if not pattern.reads and not self.queries:
            raise TaskError(
                f"task {pattern.text!r} reads nothing, and {type(self).__name__} answers only from what was read"
            )
        return pattern

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """Where the sample's tokens go, which rows this head reads, and what it learns there; a pair gives two.

        The context comes first, then the learned tokens, then, if the head is autoregressive, the answer.

        Raises:
            StreamError: nothing to read, or a target that cannot be learned; the packer says which sample it is.
            TaskError: an answer is to be continued, and this head answers at once.
        """
        segments = sample.read()
        read = tokens_of(segments)
        if sample.pattern.reads and not read and not self.autoregressive:
            raise StreamError(
                f"every field that is read is None; give at least one, as {type(self).__name__} answers only from what was read"
            )
        if sample.begin is not None and not self.autoregressive:
            raise TaskError(
                f"task {sample.pattern.text!r}: {type(self).__name__} answers at once; there is nothing to begin"
            )
        if self.queries:
            segments.append(sample.start)
        answer, target = sample.answer(), None
        if sample.learn and answer is not None:
            target = self.target(answer, read, sample.tokenizer)
        if self.autoregressive and answer is not None and len(answer):
            segments.append(sample.written(answer))
        # with learned tokens their rows are read, and those after them; else those of the context
        first, last = (read, tokens_of(segments)) if self.queries else (0, read)
        return [LaidOut(segments, read, first, last, target)]

    def check_core(self, pattern: str, core: Any) -> None:
        """Raise a ConfigError if a task of this head cannot be answered by this core."""

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
        """The next features (N, F) of a continuous head and the logit (N,) of stopping instead; a function of the noise.

        With guide_ND, the states of the same samples without what they read, what is drawn is pushed away from theirs.
        """
        raise ConfigError(f"{type(self).__name__} writes no features")

    def inputs(self, reading: Reading, state_TD: Tensor) -> dict[str, Any]:
        """What `logits` and `state_loss` get by name beside the rows of a reading."""
        return {}

    @property
    def draws_features(self) -> bool:
        """Whether it writes features, drawn by `draw`, and not ids chosen by their logits."""
        return type(self).draw is not Head.draw

    def source(self, sample: EncodedSample) -> Tokens | None:
        """The tokens read that an answer is made of, which it then chooses by their number; None: it chooses ids of its kind."""
        return None

    def choices(self, tokens: Tokens, source: Tokens | None) -> list[int]:
        """Tokens as they are chosen: by their ids; features are drawn and not chosen."""
        return [] if self.draws_features else tokens.content.tolist()

    def next_logits(
        self, readout: Readout, state_ND: Tensor, sources: Sequence[Tensor], chosen: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits (N, V) of the next token of N answers, from the newest state of each.

        sources: of each answer the states (M, D) of its `source`. chosen: of each answer what was chosen so far.
        """
        return self.logits(readout, state_ND, [1] * len(state_ND))

    def check_decoding(self, where: str, options: Any, prefix: Any) -> None:
        """Raise a ConfigError for options of `Model.generate` that have no meaning for this head."""
        if self.draws_features and (options.beams > 1 or options.sampler is not None):
            raise ConfigError(f"{where}: {type(self).__name__} writes features; beams and samplers choose among tokens")

    @abstractmethod
    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        """One answer a sample."""

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        """What the loss compares with, one entry a real target, made in the data workers; `rows` are those it is learned from.

        Raises:
            StreamError: this target cannot be learned from so few rows.
        """
        return tokens.content

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        """Make the learnable half for a core of this width."""
        return Readout(width, self.vocab(tokenizer), self.queries)


def linear_cross_entropy(linear: nn.Linear, state_ND: Tensor, target_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of F.cross_entropy(linear(state), target, label_smoothing=smoothing), in nats and float32 at least.

    Of a large vocabulary the logits are made, used and forgotten some rows at a time, gradients in the same pass: they are softmax
    minus target (Bridle 1990), so only the gradients themselves are stored for the backward pass.
    """
    chunk = CHUNK_CUDA if state_ND.is_cuda else CHUNK
    if state_ND.shape[0] * linear.out_features <= chunk or not is_untouched(linear):
        logits = linear(state_ND)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, target_N, label_smoothing=smoothing, reduction="sum")
    size = max(1, chunk // linear.out_features)
    given = (state_ND, linear.weight, linear.bias)
    if not torch.is_grad_enabled():  # an autograd Function does not know
        given = tuple(None if x is None else x.detach() for x in given)
    return _Chunked.apply(*given, target_N, smoothing, size)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        smoothing: float,
        size: int,
    ) -> Tensor:
        device = state_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the loss, and of what is added up over chunks
        for_state, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_ND = torch.empty_like(state_ND) if for_state else None
        grad_VD = torch.zeros_like(weight_VD, dtype=exact) if for_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=exact) if for_bias and bias_V is not None else None
        total = torch.zeros((), dtype=exact, device=state_ND.device)
        with torch.autocast(device, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(state_ND), size):
                state, target_N1 = state_ND[start : start + size].to(dtype), target_N[start : start + size, None]
                log_p = F.linear(state, weight, bias).to(exact).log_softmax(-1)
                total -= (1 - smoothing) * log_p.gather(1, target_N1).sum()
                if smoothing:
                    total -= smoothing * log_p.mean(-1).sum()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                grad = log_p.exp_()  # of the logits: softmax - target
                if smoothing:
                    grad -= smoothing / grad.shape[1]
                grad.scatter_add_(1, target_N1, torch.full_like(target_N1, smoothing - 1, dtype=exact))
                if grad_V is not None:
                    grad_V += grad.sum(0)
                grad = grad.to(dtype)
                if grad_ND is not None:
                    grad_ND[start : start + size] = grad @ weight
                if grad_VD is not None:
                    if dtype == exact:
                        grad_VD.addmm_(grad.T, state)
                    else:
                        grad_VD += grad.T @ state
        ctx.grads = grad_ND, grad_VD, grad_V
        ctx.dtypes = state_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True; the gradients below would count as constants in silence
            raise RuntimeError(
                "linear_cross_entropy: gradients of a large vocabulary are made in the forward pass and cannot be differentiated "
                "again; for second derivatives use the head's loss of its logits"
            )
        scaled = (None if g is None else (g * grads[0]).to(d) for g, d in zip(ctx.grads, ctx.dtypes, strict=True))
        return *scaled, None, None, None


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


def tokens_of(segments: Iterable[Segment]) -> int:
    """Number of tokens."""
    return sum(len(segment.tokens) for segment in segments)
