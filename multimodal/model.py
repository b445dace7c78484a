"""Tokenizers + core + heads = a model: loss, predict, generate, save, load."""

import dataclasses
import inspect
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal import checkpoint
from multimodal.attention import Backend, Cache, Hard, Mechanism, Trace
from multimodal.attention.reinforce import choice_loss
from multimodal.core import Core
from multimodal.data.frames import as_samples
from multimodal.data.sources import in_batches, is_indexed
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.generate import Engine, Piece, Prefix, Sampler, read_prefix, request
from multimodal.generate.request import Answer
from multimodal.heads import Head, Prediction, Readout
from multimodal.packer import Packer
from multimodal.process_state import preserved_state
from multimodal.retrieval import matches, side_vectors
from multimodal.shapes import ConfigError, StreamError, TaskError, check_seed, check_whole, did_you_mean
from multimodal.stream import Stream
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, describe

Sample = Mapping[str, Any]


class Model(nn.Module):
    """One model for many kinds of data.

    tokenizers: name of a kind -> its tokenizer; core: the transformer; tasks: "image -> label" or Task("...", head, weight).
    Every part draws its first weights from `seed` and its own name, so one more tokenizer changes no other part.

    What is done with it; what else help() lists comes from torch.nn.Module:
        predict, generate, stream   answer a task, for one sample by keywords or for a list of samples; or piece by piece
        read                        read the first fields of a task once, for many answers
        vectors, matches            what a pair such as "image <-> text" makes of its sides, and how well they fit
        save, load, extended        a folder with its declarations and weights, and a model with more kinds and tasks
        pack, logits, losses, loss  a packed stream of samples, and its logits and losses
        forward, embed, rows        the states of a stream, and the tokens that the core reads
        readout, report             the learned half of a task's head, and the number of parameters by part
        tasks, device, most_tokens, chooses   what it declares, where it is, and what its attention can do
        resting                     a context without training mode and gradients
    Training is `multimodal.fit`, measuring is `multimodal.evaluate`.

    Raises:
        ConfigError, TaskError: something declared does not fit together.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        core: Core | EncoderDecoder,
        tasks: Sequence[str | Task],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._rests = False
        if isinstance(tasks, (str, Task)):
            tasks = [tasks]
        if not isinstance(core, (Core, EncoderDecoder)):
            raise ConfigError(f"Model: core is {type(core).__name__}; give a Core, for instance Core.small()")
        for name in tokenizers:
            if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
                raise ConfigError(
                    f"Model: a tokenizer cannot be named {name!r}: tasks name it, as one word of the letters a to z, digits and "
                    "underscores; use a plain word such as 'image'"
                )
            if hasattr(nn.ModuleDict(), name):
                raise ConfigError(
                    f"Model: a tokenizer cannot be named {name!r}: its weights are stored under this name in a ModuleDict of "
                    f"torch, which has a {name!r} of its own; call it {name.strip('_')}_kind, say. A field may have the name: "
                    f"'{name}:{name.strip('_')}_kind -> ...'"
                )
        self.packer = Packer(tokenizers, tasks)
        self.seed = seed
        self.embeds = nn.ModuleDict()
        for name, tokenizer in self.packer.tokenizers.items():
            with _drawn_from(seed, "embed", name):
                self.embeds[name] = tokenizer.embed(core.width)
        with _drawn_from(seed, "core"):
            self.core = core.build()
        self.readouts = nn.ModuleDict()
        heads: dict[str, Head] = {}
        for pattern in self.packer.tasks:
            key, head = self.packer.head_key(pattern), self.packer.head(pattern)
            if head.hides and (isinstance(core, EncoderDecoder) or not any(core.rotary_split)):
                raise ConfigError(
                    f"Model: task {pattern!r}: hidden tokens know their places by rotary turns in the core that reads the others; "
                    "give one Core, whose rotary_split is not all 0"
                )
            made_for = heads.setdefault(key, head)
            with _drawn_from(seed, "head", key):
                kind = self.packer.patterns[pattern].fields[-1].kind  # of a pair either would do
                made = head.readout(core.width, self.packer.tokenizers[kind])
            if key not in self.readouts:
                self.readouts[key] = made
            if type(made_for) is not type(head) or _shapes(self.readouts[key]) != _shapes(made):
                raise ConfigError(
                    f"Model: task {pattern!r} would share the weights of another head, {made_for}, which {head} does not fit; "
                    "tasks that write one kind by one class of head share its weights, so give the class another name"
                )

    @property
    def most_tokens(self) -> int | None:
        """How long a sample may be, read and written, where a score or prior knows so many places only; None: no such bound."""
        if isinstance(self.core.core, EncoderDecoder):
            return None
        parts = [
            part
            for m in self.core.modules()
            if isinstance(m, Mechanism) and m.name.endswith(" self")
            for part in (m.score, *m.priors, *m.factors)
        ]
        return min((part.most for part in parts if part.most is not None), default=None)

    @property
    def chooses(self) -> bool:
        """Whether an attention layer reads by choosing, which is learned from rewards."""
        return any(isinstance(m, Mechanism) and isinstance(m.read, Hard) for m in self.core.modules())

    @property
    def device(self) -> torch.device:
        return self.core.norm.weight.device

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by pattern."""
        return self.packer.tasks

    def _kind_written(self, pattern: str) -> Tokenizer:
        return self.packer.tokenizers[self.packer.patterns[pattern].writes.kind]

    def readout(self, pattern: str) -> Readout:
        """The learnable half of a task's head."""
        module = self.readouts[self.packer.head_key(pattern)]
        assert isinstance(module, Readout)
        return module

    def embed(self, kind: str, content: Tensor) -> Tensor:
        """Rows (N, D) of everything of one kind; "head:..." are the learned tokens that open a written segment."""
        if kind.startswith("head:"):
            query = self.readouts[kind.removeprefix("head:")].query
            assert isinstance(query, Tensor)
            return F.embedding(content, query)  # indexing would add up gradients in any order on several threads
        module, dtype = self.embeds[kind], self.core.norm.weight.dtype
        if content.is_floating_point():
            full = getattr(module, "full_precision", False)
            content = content.to(torch.promote_types(dtype, torch.float32) if full else dtype)
        rows = module(content)
        return rows if torch.is_autocast_enabled(rows.device.type) else rows.to(dtype)

    def rows(self, stream: Stream) -> Tensor:
        """The embedded tokens (T, D) of a packed stream: what the core reads."""
        rows = torch.cat([self.embed(kind, content) for kind, content in stream.content.items()])
        if rows.shape[0] != len(stream):
            raise StreamError(
                f"Model: the tokenizers embedded {rows.shape[0]} tokens of {len(stream)}; an embed must give one row a token"
            )
        return rows if stream.order_T is None else rows[stream.order_T]

    def forward(
        self,
        stream: Stream,
        *,
        cache: Cache | None = None,
        backend: Backend = "auto",
        trace: Trace | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """States (T, D) of a packed stream, or (N, D) of wanted rows alone; a trace collects what every attention layer does."""
        options = {"cache": cache, "backend": backend, "trace": trace, "wanted_N": wanted_N}
        return self.core(self.rows(stream), stream.position_TA, stream.layout, **options)

    def logits(self, stream: Stream, *, backend: Backend = "auto") -> dict[str, Tensor]:
        """Logits (rows, V) by task, in the order of `stream.readings`."""
        wanted_N, readings = stream.narrowed()
        state_TD = self(stream, backend=backend, wanted_N=wanted_N)
        return {
            pattern: self.packer.head(pattern).logits(
                self.readout(pattern), state_TD[r.row_N], r.lengths, **r.memory(state_TD)
            )
            for pattern, r in readings.items()
        }

    def losses(self, stream: Stream, *, backend: Backend = "auto") -> dict[str, Tensor]:
        """Sum of the losses over all real targets, by task; their number is `stream.readings[task].count`."""
        sums = {}
        trace = Trace() if self.training and self.chooses else None
        wanted_N, readings = stream.narrowed() if trace is None else (None, stream.readings)
        state_TD = self(stream, backend=backend, trace=trace, wanted_N=wanted_N)
        for pattern, r in readings.items():
            if r.target is None:
                raise StreamError(
                    f"task {pattern!r}: this stream was packed without answers; pack it with answers=True"
                )
            head, readout = self.packer.head(pattern), self.readout(pattern)
            if trace is None:
                sums[pattern] = head.state_loss(
                    readout, state_TD[r.row_N], r.lengths, r.target, r.target_lengths, **r.memory(state_TD)
                )
                continue
            nll_N = head.row_losses(head.logits(readout, state_TD[r.row_N], r.lengths, **r.memory(state_TD)), r.target)
            extra = choice_loss(
                trace, stream.layout, nll_N.new_zeros(len(stream)).index_copy(0, r.row_N, nll_N.detach())
            )
            sums[pattern] = nll_N.sum() + extra - extra.detach()  # a gradient, and no part of the figure
        return sums

    def loss(self, stream: Stream, *, counts: Mapping[str, int] | None = None) -> Tensor:
        """Weighted sum over tasks of the mean loss of a real target, in nats.

        counts: what to divide by instead of this stream's own targets: those of all micro-batches that are summed up.
        """
        counts = counts or {pattern: r.count for pattern, r in stream.readings.items()}
        parts = [self.tasks[p].weight * total / max(counts[p], 1) for p, total in self.losses(stream).items()]
        return torch.stack(parts).sum()

    def pack(self, task: str, samples: Sequence[Sample], *, answers: bool = True, first: int = 0) -> Stream:
        """Pack samples of one task, on this model's device; errors count them from `first`."""
        names = [f"sample {first + i}" for i in range(len(samples))]
        return self.packer([(task, sample) for sample in samples], answers=answers, names=names).to(self.device)

    def predict(self, task: str, /, samples: Iterable[Sample] | None = None, *, batch: int = 64, **fields: Any) -> Any:
        """The best answer: `predict("image -> label", image="cat.png")`, or a list of answers for a list of samples.

        Samples are read `batch` at a time, so that they may be any number of files, or something that can only be iterated.
        """
        self.packer.check_task(task, answers=True)
        if samples is None:
            self._check_fields(task, "predict", fields)
            return self.predict(task, [fields])[0]
        samples = self._check_call(task, samples, fields, batch)
        if self.packer.head(task).writes:
            return self.generate(task, samples, batch=batch)
        answers: list[Prediction] = []
        with preserved_state(), self.resting():
            for part in in_batches(samples, batch):
                stream = self.pack(task, part, answers=False, first=len(answers))
                r = stream.readings[task]
                hidden = {"hidden": r.hidden} if r.hidden else {}
                found = self.packer.head(task).answer(
                    self.logits(stream)[task], r.lengths, self._kind_written(task), **hidden
                )
                by_number = zip(r.samples, found, strict=True)
                answers += [answer for _, answer in sorted(by_number, key=lambda pair: pair[0])]
        return answers

    def vectors(self, task: str, samples: Sequence[Sample], *, side: str | None = None, batch: int = 64) -> Tensor:
        """Unit vectors (N, F) of one side of a pair such as "image <-> text", the one that the samples have.

        side: "left" or "right", if they have both.
        """
        return side_vectors(self, task, in_batches(self._check_call(task, samples, {}, batch), batch), side)

    def matches(self, task: str, left: Sequence[Sample], right: Sequence[Sample], *, batch: int = 64) -> Tensor:
        """(N, M): how probably each left side of a pair goes with each right one.

        A softmax `Contrast` shares 1 among all the rights of a left; a sigmoid one judges each two by themselves.
        """
        sides = ("left", left), ("right", right)
        return matches(self, task, *(self.vectors(task, samples, side=side, batch=batch) for side, samples in sides))

    def generate(
        self,
        task: str,
        /,
        samples: Iterable[Sample] | None = None,
        *,
        max_tokens: int = 256,
        sampler: Sampler | None = None,
        temperature: float | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        guidance: float = 1.0,
        stop: str | Sequence[str] = (),
        begin: Any = None,
        begins: Sequence[Any] | None = None,
        seed: int = 0,
        prefix: Prefix | None = None,
        batch: int = 64,
        **fields: Any,
    ) -> Any:
        """Write an answer token by token. One answer, or a list for a list of samples, each as if it were alone.

        The likeliest token is taken each time, unless a sampler or a temperature above 0 says otherwise (for kinds that are
        features temperature scales the noise they are drawn from, 1 unless given).
        beams: so many beginnings are carried on and the likeliest whole answer wins, by log p / tokens ** length_penalty; the
        others are its `others`. guidance: above 1 pushes away from what would be written if nothing were read (Ho & Salimans
        2022). stop: texts that end a text, and are not part of it. begin: a value that every answer begins with; max_tokens does
        not count it, nor does it cut a kind of a fixed length, which is written whole. begins: such a value for each sample, of any
        kind, or None for one that begins with nothing; a list of texts may also be given as begin, since no text is a list. An
        option that would change nothing is refused.
        seed: of sample i it is seed + i. prefix: what `read` gave. batch: rows written at the same time.

        Raises:
            ConfigError: options that do not fit the task. StreamError: a sampler that leaves no candidate.
        """
        options = {
            k: v for k, v in locals().items() if k not in ("self", "task", "samples", "prefix", "batch", "fields")
        }
        self.packer.check_task(task, answers=True)
        if samples is None:
            self._check_fields(task, "generate", fields, prefix.fields if prefix else ())
            return self.generate(task, [fields], prefix=prefix, batch=batch, **options)[0]
        samples = self._check_call(task, samples, fields, batch)
        if not self.packer.head(task).writes:
            idle = ("beams", "begin", "begins", "guidance", "length_penalty", "sampler", "stop", "temperature")
            options = {**options, "temperature": options["temperature"] or None}  # with 0 nothing is drawn, as here
            given = [name for name in idle if not _is_left_out(options[name])]
            if given or prefix is not None:
                raise ConfigError(
                    f"task {task!r}: {type(self.packer.head(task)).__name__} answers at once, so {', '.join(given) or 'prefix'} "
                    "has no meaning there"
                )
            return self.predict(task, samples, batch=batch)
        found: dict[int, Prediction] = {}
        with preserved_state(), self.resting():
            for piece in self._written(task, samples, prefix, batch, options):
                if piece.prediction is not None:
                    found[piece.ticket] = piece.prediction
        return [found[i] for i in range(len(found))]

    def stream(
        self,
        task: str,
        /,
        samples: Iterable[Sample] | None = None,
        *,
        prefix: Prefix | None = None,
        batch: int = 64,
        **options: Any,
    ) -> Iterator[Piece]:
        """Write like `generate`, telling each piece as soon as it is sure; options are those of `generate`, or the sample's fields.

        A piece says by its `ticket` which sample it is of; the texts of a sample's pieces together are its answer, and its last
        piece carries the whole `prediction`.
        """
        self.packer.check_task(task, answers=True)
        names = {field.name for field in self.packer.patterns[task].reads}
        fields = {name: options.pop(name) for name in (names & set(options)) - set(self._options())}
        if samples is None:
            self._check_fields(task, "stream", fields, prefix.fields if prefix else ())
        chosen = [fields] if samples is None else self._check_call(task, samples, fields, batch)
        return self._written(task, chosen, prefix, batch, options)

    def read(self, task: str, /, **fields: Any) -> Prefix:
        """Read the first fields of a task once, to be given to `generate` or `stream` as `prefix` with many different others.

        Raises:
            ConfigError: fields that are not the first of the task, or later fields that those would have had to see.
        """
        return read_prefix(self, task, fields)

    def _written(
        self, task: str, samples: Iterable[Sample], prefix: Prefix | None, batch: int, options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        """The pieces of all answers; at most one batch of samples is encoded ahead."""
        answers = self._requests(task, samples, prefix, options)
        waiting: deque[Answer] = deque()
        before = 0  # number of answers of earlier engines
        while waiting.extend(islice(answers, batch + 1 - len(waiting))) or waiting:
            width, more = waiting[0].width, len(waiting) > batch
            # room for somewhat longer answers, since one that does not fit waits until all others have ended
            capacity = max(answer.prompt + answer.limit for answer in waiting) + 1
            engine = Engine(
                self,
                rows=min(max(batch, width), width * len(waiting)),
                capacity=capacity * 5 // 4 if more else capacity,
            )
            entered = 0
            while engine.busy or (waiting and engine.has_room(waiting[0])):
                while waiting and engine.has_room(waiting[0]) and width <= engine.free:
                    engine.enter(waiting.popleft())
                    entered += 1
                    if not waiting:
                        waiting.extend(islice(answers, 1))
                for piece in engine.step():
                    if piece.error is not None:
                        raise piece.error
                    yield dataclasses.replace(piece, ticket=before + piece.ticket)
            before += entered

    def _requests(
        self, task: str, samples: Iterable[Sample], prefix: Prefix | None, options: Mapping[str, Any]
    ) -> Iterator[Answer]:
        """A request for each sample; samples are encoded lazily."""
        seed, begins = options.get("seed", 0), self._begins(task, options)
        check_seed("generate", seed)
        options = {name: option for name, option in options.items() if name != "begins"}

        def refuse(count: int | str) -> NoReturn:
            given = 0 if begins is None else len(begins)
            raise ConfigError(
                f"task {task!r}: begins has {given} values for {count} samples; give one for each, or one for all as begin"
            )

        if begins is not None and isinstance(samples, Sized) and len(samples) != len(begins):
            refuse(len(samples))
        number = -1
        for number, sample in enumerate(one for part in in_batches(samples, 1) for one in part):
            if begins is not None and number >= len(begins):
                refuse("more")
            begin = options.get("begin") if begins is None else begins[number]
            own = {**options, "seed": (seed + number) % 2**63, "begin": begin}
            yield request(self.packer, task, sample, f"sample {number}", prefix, own)
        if begins is not None and number + 1 != len(begins):
            refuse(number + 1)

    def _begins(self, task: str, options: Mapping[str, Any]) -> Sequence[Any] | None:
        """The beginning of each answer, one for each sample; None if `begin` holds for all."""
        begin: Any = options.get("begin")
        begins: Any = options.get("begins")
        if begins is None:
            return begin if isinstance(begin, list) and self._kind_written(task).text else None
        if begin is not None:
            raise ConfigError(f"task {task!r}: give begin, for every sample, or begins, one for each; not both")
        if isinstance(begins, (str, bytes, Mapping)) or not hasattr(begins, "__len__"):
            raise ConfigError(
                f"task {task!r}: begins={describe(begins)} is no list; give a value for each sample, or None"
            )
        return list(begins)  # by their order: a Series of pandas would be asked by its labels

    def _options(self) -> list[str]:
        """The keyword options of `generate`, without the fields of a task."""
        return [n for n in inspect.signature(self.generate).parameters if n not in ("task", "samples", "fields")]

    def _check_fields(self, task: str, verb: str, fields: Mapping[str, Any], read: Iterable[str] = ()) -> None:
        """Refuse what was given by name and is neither a field of the task nor an option: it would be lost in silence."""
        self.packer.check_task(task)
        pattern = self.packer.patterns[task]
        known = [field.name for field in pattern.reads]
        options = self._options()
        taken = ["samples", "batch"] if verb == "predict" else ["samples", *options]
        if hidden := [name for name in known if name in taken and name not in read]:
            raise TaskError(
                f"task {task!r} reads a field {hidden[0]!r}, which by keyword is an option of {verb}; give the sample as a "
                f"mapping: {verb}({task!r}, [{{{', '.join(f'{name!r}: ...' for name in known)}}}])"
            )
        if not set(fields) | set(read) >= set(known):
            return  # a field is missing, which is the better clue, and is said where samples are checked
        for name in fields:
            if name in known:
                continue
            clue = did_you_mean(name, [*known, *options])
            if name == pattern.answer:
                clue = ", and writes this; what an answer begins with is given as begin="
            elif name in options:
                clue = "; that is an option of generate"
            raise TaskError(f"task {task!r} has no field {name!r}; it reads {', '.join(known) or 'nothing'}{clue}")

    def _check_call(self, task: str, samples: Any, fields: Mapping[str, Any], batch: int) -> Iterable[Sample]:
        self.packer.check_task(task)
        if fields:
            raise ConfigError(f"task {task!r}: give either samples or the fields {', '.join(fields)}, not both")
        check_whole(f"task {task!r}", batch=batch)
        if batch < 1:
            raise ConfigError(f"task {task!r}: batch={batch} must be at least 1")
        if isinstance(samples, Mapping):
            raise ConfigError(f"task {task!r}: samples is one mapping; give a list of samples, or its fields by name")
        if isinstance(samples, (str, bytes)) or not (is_indexed(samples) or hasattr(samples, "__iter__")):
            raise ConfigError(
                f"task {task!r}: samples is {type(samples).__name__}; give a list of samples, or anything with a length and "
                "[index], or that can be iterated"
            )
        return as_samples(samples)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Evaluation mode without gradients, and back; within another one nothing is left to do."""
        if self._rests and torch.is_inference_mode_enabled():
            yield
            return
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        self._rests = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self._rests = False
            for module in training:
                module.training = True

    def extended(self, tokenizers: Mapping[str, Tokenizer] | None = None, tasks: Sequence[str | Task] = ()) -> "Model":
        """A model with more kinds and tasks; every weight this one has is there, bit for bit.

        Raises:
            ConfigError: a name that is already taken.
        """
        for name in tokenizers or {}:
            if name in self.packer.tokenizers:
                raise ConfigError(f"Model.extended: there is already a tokenizer named {name!r}; choose another name")
        more = Model(
            {**self.packer.tokenizers, **(tokenizers or {})},
            self.core.core,
            [*self.tasks.values(), *tasks],
            seed=self.seed,
        )
        more.to(self.device, self.core.norm.weight.dtype).load_state_dict(self.state_dict(), strict=False)
        return more.train(self.training)

    def report(self) -> str:
        """Parameters by part, in lines."""
        parts = {f"tokenizer {name}": part for name, part in self.embeds.items()}
        parts |= {"core": self.core} | {f"head {key}": part for key, part in self.readouts.items()}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        counts["all"] = sum(counts.values())
        return "\n".join(f"{name:<32}{count:>14,}" for name, count in counts.items())

    def save(self, folder: str | Path) -> Path:
        """Write config.json, weights.safetensors and the tokenizers' files; whole or not at all."""
        return checkpoint.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", finite: bool = True) -> Self:
        """Read what `save` wrote; runs no code but installed entry points.

        finite: refuse weights that are NaN or infinite; False allows to inspect such a model.

        Raises:
            CheckpointError: missing or foreign files, tensors or tokenizers, each by name; weights that are no finite numbers.
        """
        return checkpoint.load(cls, Path(folder), finite=finite).to(device).eval()


def _is_left_out(option: Any) -> bool:
    """Whether an option of `generate` has the value that it has unless given; arrays have none of these."""
    return option is None or (isinstance(option, (int, float, tuple)) and option in (1, ()))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}


@contextmanager
def _drawn_from(seed: int, *names: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32("/".join((str(seed), *names)).encode()))
        yield
