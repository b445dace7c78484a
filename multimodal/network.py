"""The weights of a model, and its passes over packed streams: embedded tokens -> core -> states -> logits and losses."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Backend, Cache, Hard, Mechanism, Trace
from multimodal.attention.reinforce import reward_loss
from multimodal.composite import Written, check_module_name
from multimodal.core import Core
from multimodal.declare import Declared
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.heads import Head, Readout
from multimodal.heads.base import GatherRows, weights_class
from multimodal.old_names import warn
from multimodal.packer import Packer
from multimodal.positions import check_known
from multimodal.relations import named_relations
from multimodal.shapes import ConfigError, StreamError, did_you_mean
from multimodal.stream import Stream
from multimodal.task import Task
from multimodal.tokenizer import Places, Tokenizer

Sample = Mapping[str, Any]


class Network(nn.Module):
    """The modules of a model: an embedding for each kind, the core, and a readout for each head.

    Everything here works on packed streams. `Model` adds what users do with a model: predict, generate, save.

    most_tokens: the most tokens of a sample, read and written, for which its attention has positions; None: any number.
    most_written: the same for the tokens of the writer of an EncoderDecoder, which are those of the start and of the answer.
    origin: where weights of others came from, as `multimodal.pretrained` notes it; None: these weights are our own.
    adapters: the declaration of the adapters that were attached to its layers, see lora.py; None: there are none.
    quantization: how its matrices are stored, if `quantize` made it, see quantization.py; None: as they were trained.
    learns_from_rewards: whether an attention layer samples one key (`Hard`) and is therefore trained by REINFORCE.
    """

    origin: Mapping[str, Any] | None = None

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        core: Core | EncoderDecoder,
        tasks: Sequence[str | Task],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._inferring = False
        self.adapters: Declared | None = None
        self.quantization: Declared | None = None
        if isinstance(tasks, (str, Task)):
            tasks = [tasks]
        if not isinstance(core, (Core, EncoderDecoder)):
            raise ConfigError(f"Model: core is {type(core).__name__}; give a Core, for instance Core.small()")
        for name in tokenizers:
            _check_name(name)
        self.packer = Packer(tokenizers, tasks, core.axes)
        placed = {f"tokenizers[{name!r}]": tokenizer.axes for name, tokenizer in self.packer.tokenizers.items()}
        repair = "core.replace(axes={axes})"
        if isinstance(core, EncoderDecoder):
            repair = "core.replace(reader=core.reader.replace(axes={axes}), writer=core.writer.replace(axes={axes}))"
        check_known("Model: ", placed, core.axes, repair)
        _check_relations(core, self.packer)
        self.seed = seed
        # each part has its own random numbers, by the seed and its name, so that one more tokenizer changes no other part
        self.embeds = nn.ModuleDict()
        for name, tokenizer in self.packer.tokenizers.items():
            with _seeded(seed, "embed", name):
                self.embeds[name] = tokenizer.embed(core.width)
        with _seeded(seed, "core"):
            self.core = core.build()
        kinds = {leaf.weights for leaf in self.packer.kinds.values()}
        self.packer.reads_places = frozenset(k for k in kinds if getattr(self.embedding(k), "reads_places", False))
        if not isinstance(core, EncoderDecoder):
            self.packer.most_times = core.learned_times
        elif core.reader.learned_times is not None or core.writer.learned_times is not None:
            self.packer.most_times = core.reader.learned_times, core.writer.learned_times
        mechanisms = [m for m in self.core.modules() if isinstance(m, Mechanism)]
        # the choice of a key has no gradient, so that such layers learn from a reward
        self.learns_from_rewards = any(isinstance(m.read, Hard) for m in mechanisms)
        self.most_tokens = None if isinstance(core, EncoderDecoder) else _most_tokens(mechanisms, core)
        self.most_written = core.writer.learned_times if isinstance(core, EncoderDecoder) else None
        self.readouts = nn.ModuleDict()
        heads: dict[str, Head] = {}
        for pattern in self.packer.tasks:
            key, head = self.packer.keys[pattern], self.packer.heads[pattern]
            head.check_core(pattern, core)
            made_for = heads.setdefault(key, head)
            with _seeded(seed, "head", key):
                made = head.readout(core.width, self.packer.answer_tokenizers[pattern])
                head.tie(made, self.embeds[self.packer.patterns[pattern].fields[-1].kind])
            # tasks of one key share the readout of the first, so the others must be of the same class and shapes
            if key not in self.readouts:
                self.readouts[key] = made
            if weights_class(made_for) is not weights_class(head) or _shapes(self.readouts[key]) != _shapes(made):
                raise ConfigError(
                    f"Model: task {pattern!r} would share the weights of another head, {made_for}, which {head} does not fit; "
                    "tasks that write one kind by one class of head share its weights, so give the class another name"
                )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the core's weights; of quantized ones that in which they are multiplied."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """A weight of the core; if it has none, of the model."""
        return next(chain(self.core.parameters(), self.parameters()))  # lazily: a large model has hundreds of weights

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by pattern."""
        return self.packer.tasks

    def readout(self, pattern: str) -> Readout:
        """The module of a task's head."""
        module = self.readouts[self.packer.keys[pattern]]
        assert isinstance(module, Readout)
        return module

    def pack(self, task: str, samples: Sequence[Sample], *, answers: bool = True, first: int = 0) -> Stream:
        """Pack samples of one task as a stream on this model's device.

        answers: whether the samples have answers, which become targets. first: the number that errors give the first sample.

        Raises:
            TaskError, StreamError, MediaError: as `Packer` does.
        """
        names = [f"sample {first + i}" for i in range(len(samples))]
        return self.packer([(task, sample) for sample in samples], answers=answers, names=names).to(self.device)

    def loss(
        self, stream: Stream, *, counts: Mapping[str, float] | None = None, gather: GatherRows | None = None
    ) -> Tensor:
        """The mean loss of a target of each task, in nats, summed over tasks with their weights.

        counts: by task, what to divide by, the number of targets or the sum of their weights (`Head.divisor`); a training step
        gives those of all its micro-batches. None: this stream's own. gather: as of `losses`.
        """
        counts = counts or {pattern: self.divisor(stream, pattern) for pattern in stream.readings}
        tasks = self.packer.tasks
        sums = self.losses(stream, gather=gather)
        parts = [tasks[p].weight * total / (counts[p] or 1) for p, total in sums.items()]
        return torch.stack(parts).sum()

    def divisor(self, stream: Stream, pattern: str) -> float:
        """What the sum of the losses of a task is divided by for their mean, see `Head.divisor`."""
        r = stream.readings[pattern]
        return r.count if r.target is None else self.packer.heads[pattern].divisor(r.target, r.target_lengths)

    def losses(
        self, stream: Stream, *, backend: Backend = "auto", gather: GatherRows | None = None
    ) -> dict[str, Tensor]:
        """By task, the sum of the losses of all targets, in nats; for their mean divide by `divisor`.

        gather: gives heads that compare samples those of the streams of other processes too, each of which calls this at the same
        time, for the same tasks, whatever its stream holds; None: they compare those of this stream.

        Raises:
            StreamError: the stream was packed without answers.
        """
        if self.training and self.learns_from_rewards:
            return self._losses_and_rewards(stream, backend)
        wanted_N, readings = stream.narrowed()
        state_TD = self(stream, backend=backend, wanted_N=wanted_N)
        sums = {}
        # in one order in all processes, of which none knows the tasks of the others
        for pattern in readings if gather is None else self.packer.tasks:
            head, r = self.packer.heads[pattern], readings.get(pattern)
            if r is None:
                if gather is not None and head.gathers:
                    sums[pattern] = head.absent_loss(state_TD, gather)
                continue
            if r.target is None:
                raise StreamError(_no_answers(pattern))
            inputs = head.inputs(r, state_TD) | ({"gather": gather} if head.gathers else {})
            sums[pattern] = head.state_loss(
                self.readout(pattern), state_TD[r.row_N], r.lengths, r.target, r.target_lengths, **inputs
            )
        return sums

    def _losses_and_rewards(self, stream: Stream, backend: Backend) -> dict[str, Tensor]:
        """`losses`, with gradients for the choices of `Hard` reads, whose reward is minus the loss of each row."""
        trace = Trace()
        state_TD = self(stream, backend=backend, trace=trace)
        sums = {}
        for pattern, r in stream.readings.items():
            if r.target is None:
                raise StreamError(_no_answers(pattern))
            head = self.packer.heads[pattern]
            logits = head.logits(self.readout(pattern), state_TD[r.row_N], r.lengths, **head.inputs(r, state_TD))
            nll_N = head.row_losses(logits, r.target)
            nll_T = nll_N.new_zeros(len(stream)).index_copy(0, r.row_N, nll_N.detach())
            extra = reward_loss(trace, stream.layout, nll_T)
            sums[pattern] = nll_N.sum() + extra - extra.detach()  # adds 0 to the loss, and its gradient
        return sums

    def logits(self, stream: Stream, *, backend: Backend = "auto") -> dict[str, Tensor]:
        """By task, the logits (N, V) of the rows that its head reads, in the order of `stream.readings`."""
        wanted_N, readings = stream.narrowed()
        state_TD = self(stream, backend=backend, wanted_N=wanted_N)
        logits = {}
        for pattern, r in readings.items():
            head = self.packer.heads[pattern]
            logits[pattern] = head.logits(
                self.readout(pattern), state_TD[r.row_N], r.lengths, **head.inputs(r, state_TD)
            )
        return logits

    def forward(
        self,
        stream: Stream,
        *,
        cache: Cache | None = None,
        backend: Backend = "auto",
        trace: Trace | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """The core's states (T, D) of a packed stream.

        Args:
            cache: the KV cache that a prompt fills and later tokens extend.
            backend: the attention backend, see `plan_attention`.
            trace: collects a record of every attention layer.
            wanted_N: rows of the stream; if given, only their states (N, D) are returned, in this order.
        """
        options = {"cache": cache, "backend": backend, "trace": trace, "wanted_N": wanted_N}
        return self.core(self.rows(stream), stream.position_TA, stream.layout, **options)

    def rows(self, stream: Stream) -> Tensor:
        """The embedded tokens (T, D) of a packed stream, which are the core's input.

        Raises:
            StreamError: an embedding returns another number of rows than there are tokens.
        """
        rows = torch.cat([self.embed(kind, x, stream.places.get(kind)) for kind, x in stream.content.items()])
        if rows.shape[0] != len(stream):
            raise StreamError(
                f"Model: the tokenizers embedded {rows.shape[0]} tokens of {len(stream)}; an embed must give one row a token"
            )
        return rows if stream.order_T is None else rows[stream.order_T]

    def embedding(self, kind: str) -> nn.Module:
        """The module that embeds a kind, or a part of a composite one: "page.picture"."""
        return self.embeds.get_submodule(self.packer.kinds[kind].weights)

    def embed(self, kind: str, content: Tensor, places: Places | None = None) -> Tensor:
        """The embedded tokens (N, D) of one kind; "head:NAME" are the learned tokens of the head with these weights.

        kind: the name of a tokenizer; "page.picture" is a part of a composite one, and "page" its marks and what is written of it.
        places: where the tokens stand, which some embeddings depend on.

        Raises:
            ConfigError: the embedding of this kind depends on places, and none are given.
        """
        if kind.startswith("head:"):
            query = self.readouts[kind.removeprefix("head:")].query
            assert isinstance(query, Tensor)
            return F.embedding(content, query)  # indexing would sum gradients in an arbitrary order on several threads
        if (written := self.packer.written_parts.get(kind)) is not None:
            return self._embed_written(kind, written, content)
        return self._embed(kind, content, places)

    def _embed_written(self, kind: str, written: Written, id_N: Tensor) -> Tensor:
        """The embedded tokens of a composite that is written: an id is a mark, or a token of one of the parts."""
        rows_ND: Tensor | None = None
        for weights, ids in written.ranges.items():
            inside_N = (id_N >= ids.start) & (id_N < ids.stop)
            at = kind + weights if not weights or weights[0] == "." else weights
            found_ND = self._embed(at, (id_N - ids.start).clamp(0, len(ids) - 1), None)
            rows_ND = found_ND if rows_ND is None else torch.where(inside_N[:, None], found_ND, rows_ND)
        assert rows_ND is not None
        return rows_ND

    def _embed(self, kind: str, content: Tensor, places: Places | None) -> Tensor:
        module, dtype = self.embedding(kind), self.dtype
        if content.is_floating_point():
            full = getattr(module, "full_precision", False)
            content = content.to(torch.promote_types(dtype, torch.float32) if full else dtype)
        if self.packer.kinds[kind].weights not in self.packer.reads_places:
            rows = module(content)
        elif places is not None:
            rows = module(content, places)
        else:
            raise ConfigError(
                f"tokenizers[{kind!r}]: each token's embedding depends on its whole value; give its places"
            )
        return rows if torch.is_autocast_enabled(rows.device.type) else rows.to(dtype)

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """A context in evaluation mode and without gradients; afterwards every module has its former mode again."""
        if self._inferring and torch.is_inference_mode_enabled():
            yield
            return
        # by module, because a user may have set some of them to evaluation mode
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        self._inferring = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self._inferring = False
            for module in training:
                module.training = True

    def resting(self) -> AbstractContextManager[None]:
        """The name of `inference_mode` in version 0.1; goes with 0.3."""
        warn("Model.resting", "Model.inference_mode", 1)
        return self.inference_mode()

    @property
    def chooses(self) -> bool:
        """The name of `learns_from_rewards` in version 0.1; goes with 0.3."""
        warn("Model.chooses", "Model.learns_from_rewards", 1)
        return self.learns_from_rewards

    def parameter_counts(self) -> dict[str, int]:
        """The number of parameters of each part ("core", "tokenizer NAME", "head NAME"), and of "all"."""
        parts = {f"tokenizer {name}": part for name, part in self.embeds.items()}
        parts |= {"core": self.core} | {f"head {key}": part for key, part in self.readouts.items()}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        counts["all"] = sum(counts.values())
        return counts


def _most_tokens(mechanisms: Sequence[Mechanism], core: Core) -> int | None:
    """The most tokens of a sample for which the core and its self-attention layers have positions; None: any number."""
    parts = [part for m in mechanisms if m.name.endswith(" self") for part in (m.score, *m.priors, *m.factors)]
    bounds = [core.learned_times, *(part.most for part in parts)]
    return min((most for most in bounds if most is not None), default=None)


def _no_answers(pattern: str) -> str:
    return f"task {pattern!r}: this stream was packed without answers; pack it with answers=True"


def _check_name(name: Any) -> None:
    """Raise a ConfigError for a name that a tokenizer cannot have; says that a field may have it."""
    try:
        check_module_name("Model: a tokenizer", name)
    except ConfigError as error:
        if not isinstance(name, str) or not name.isidentifier():
            raise
        raise ConfigError(f"{error}. A field may have the name: '{name}:{name.strip('_')}_kind -> ...'") from None


def _check_relations(core: Core | EncoderDecoder, packer: Packer) -> None:
    """Raise a ConfigError if the core names a relation that no tokenizer declares."""
    for name in named_relations(core):
        if name not in packer.relations:
            known = (
                ", ".join(map(repr, packer.relations))
                or "none: a tokenizer declares `relations` and gives Tokens.pairs"
            )
            raise ConfigError(
                f"Model: the core names the relation {name!r}, which no tokenizer declares; there are {known}"
                + did_you_mean(name, packer.relations)
            )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}


_ON_META: ContextVar[bool] = ContextVar("_ON_META", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within this context, new models have their weights on the meta device, where they take no memory.

    It serves recipe files, which construct model and data: within `torch.device("meta")` the data would have no contents either.
    """
    token = _ON_META.set(True)
    try:
        yield
    finally:
        _ON_META.reset(token)


@contextmanager
def _seeded(seed: int, *names: str) -> Iterator[None]:
    """Seeds torch's CPU generator from the seed and these names, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]), torch.device("meta") if _ON_META.get() else nullcontext():
        torch.manual_seed(zlib.crc32("/".join((str(seed), *names)).encode()))
        yield
