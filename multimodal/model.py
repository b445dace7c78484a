"""Tokenizers + core + heads = a model: what users do with it. Its weights and losses are in network.py."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from multimodal import checkpoint
from multimodal.data.frames import as_samples
from multimodal.data.sources import in_batches, is_indexed
from multimodal.generate.engine import Engine, Piece
from multimodal.generate.prefix import CachedPrefix, read_prefix
from multimodal.generate.request import Options, Request, new_request
from multimodal.generate.samplers import Sampler
from multimodal.heads import Prediction
from multimodal.network import Network, Sample
from multimodal.process_state import preserved_state
from multimodal.retrieval import match_probabilities, side_vectors
from multimodal.shapes import ConfigError, TaskError, check_seed, check_whole, did_you_mean
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, describe

OPTIONS = [field.name for field in dataclasses.fields(Options)]
BY_KEYWORD = [*OPTIONS, "begins", "prefix", "batch"]  # what `generate` takes by name beside the fields of a sample


class Model(Network):
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
        tasks, device, most_tokens, learns_from_rewards   what it declares, where it is, and what its attention can do
        inference_mode              a context without training mode and gradients
    Training is `multimodal.fit`, measuring is `multimodal.evaluate`.

    Raises:
        ConfigError, TaskError: something declared does not fit together.

    Examples:
        >>> shapes = Labels(("circle", "square"))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1), "label": shapes}, mm.Core.tiny(), ["image -> label"])
        >>> run = mm.fit(model, {"image -> label": samples}, steps=2, batch=4, quiet=True)
        >>> answer = model.predict("image -> label", image="square.png")
    """

    def predict(self, task: str, /, samples: Iterable[Sample] | None = None, *, batch: int = 64, **fields: Any) -> Any:
        """The best answer: `predict("image -> label", image="cat.png")`, or a list of answers for a list of samples.

        Samples are read `batch` at a time, so that they may be any number of files, or something that can only be iterated.

        Returns:
            A Prediction, or a list of them.

        Examples:
            >>> model.predict("image -> label", image=square).value
            'square'
            >>> [answer.value for answer in model.predict("image -> label", [{"image": circle}, {"image": square}])]
            ['circle', 'square']
        """
        self.packer.check_task(task, answers=True)
        one, samples = self._samples(task, "predict", samples, fields, batch)
        if self.packer.heads[task].autoregressive:
            answers = self._write_all(task, samples, None, batch, {})
        else:
            answers = self._answer_all(task, samples, batch)
        return answers[0] if one else answers

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
        prefix: CachedPrefix | None = None,
        batch: int = 64,
        **fields: Any,
    ) -> Any:
        """Write an answer token by token. One answer, or a list for a list of samples, each as if it were alone.

        The likeliest token is taken each time, unless a sampler or a temperature above 0 says otherwise (for kinds that are
        features temperature scales the noise they are drawn from, 1 unless given). An option that would change nothing is refused.

        Args:
            max_tokens: an answer ends after this many tokens. A kind of a fixed length is written whole.
            sampler: how the next token is chosen, such as `TopP(0.9)` or `NoRepeat(3) | Temperature(0.8)`.
            temperature: short for `sampler=Temperature(..)`; 0 is greedy.
            beams: number of hypotheses; the likeliest whole answer wins, by log p / tokens ** length_penalty, and the others
                are its `others`.
            guidance: above 1 pushes away from what would be written if nothing were read (Ho & Salimans 2022).
            stop: texts that end a text, and are not part of it.
            begin: a value that every answer begins with; max_tokens does not count it. A list of texts is one for each sample.
            begins: such a value for each sample, of any kind; None for one that begins with nothing.
            seed: of sample i it is seed + i.
            prefix: what `read` returned.
            batch: rows written at the same time.

        Raises:
            ConfigError: options that do not fit the task.
            StreamError: a sampler that leaves no candidate.

        Examples:
            >>> model.generate("image -> text", image=square, max_tokens=8).value
            'square'
            >>> bold = model.generate("image -> text", image=square, sampler=mm.TopP(0.9), seed=1, max_tokens=8)
            >>> best = model.generate("image -> text", image=square, beams=3, max_tokens=8)
        """
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "sampler": sampler,
            "temperature": temperature,
            "beams": beams,
            "length_penalty": length_penalty,
            "guidance": guidance,
            "stop": stop,
            "begin": begin,
            "begins": begins,
            "seed": seed,
        }
        self.packer.check_task(task, answers=True)
        one, samples = self._samples(task, "generate", samples, fields, batch, prefix)
        if self.packer.heads[task].autoregressive:
            answers = self._write_all(task, samples, prefix, batch, options)
        else:
            self._check_answers_at_once(task, options, prefix)
            answers = self._answer_all(task, samples, batch)
        return answers[0] if one else answers

    def stream(
        self,
        task: str,
        /,
        samples: Iterable[Sample] | None = None,
        *,
        prefix: CachedPrefix | None = None,
        batch: int = 64,
        **options: Any,
    ) -> Iterator[Piece]:
        """Write like `generate`, and yield each piece as soon as it is final.

        options: those of `generate`, or the fields of one sample.
        A piece says by its `ticket` which sample it is of; the texts of a sample's pieces together are its answer, and its last
        piece carries the whole `prediction`.
        """
        self.packer.check_task(task, answers=True)
        names = {field.name for field in self.packer.patterns[task].reads}
        fields = {name: options.pop(name) for name in (names & set(options)) - set(BY_KEYWORD)}
        _, chosen = self._samples(task, "stream", samples, fields, batch, prefix)
        return self._write(task, chosen, prefix, batch, options)

    def read(self, task: str, /, **fields: Any) -> CachedPrefix:
        """Read the first fields of a task once, to be given to `generate` or `stream` as `prefix` with many different others.

        Raises:
            ConfigError: fields that are not the first of the task, or later fields that those would have had to see.
        """
        return read_prefix(self, task, fields)

    def vectors(self, task: str, samples: Sequence[Sample], *, side: str | None = None, batch: int = 64) -> Tensor:
        """Unit vectors (N, F) of one side of a pair such as "image <-> text", the one that the samples have.

        side: "left" or "right", if they have both.
        """
        _, samples_given = self._samples(task, "vectors", samples, {}, batch)
        return side_vectors(self, task, in_batches(samples_given, batch), side)

    def matches(self, task: str, left: Sequence[Sample], right: Sequence[Sample], *, batch: int = 64) -> Tensor:
        """(N, M): the probability that each left side of a pair goes with each right one.

        A softmax `Contrast` shares 1 among all the rights of a left; a sigmoid one judges each two by themselves.
        """
        sides = ("left", left), ("right", right)
        vectors = [self.vectors(task, samples, side=side, batch=batch) for side, samples in sides]
        return match_probabilities(self, task, *vectors)

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
        return "\n".join(f"{name:<32}{count:>14,}" for name, count in self.parameter_counts().items())

    def __repr__(self) -> str:
        tasks = [f"    {pattern}  by {self.packer.head(pattern)}" for pattern in self.tasks]
        kinds = [f"    {name}: {tokenizer}" for name, tokenizer in self.packer.tokenizers.items()]
        parameters = [f"    {line}" for line in self.report().split("\n")]
        return "\n".join(
            [
                "Model",
                "  tasks",
                *tasks,
                "  tokenizers",
                *kinds,
                f"  core\n    {self.core.core}",
                "  parameters",
                *parameters,
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write config.json, weights.safetensors and the tokenizers' files; whole or not at all. Returns the folder.

        Examples:
            >>> folder = model.save("shapes")
            >>> sorted(path.name for path in folder.iterdir() if path.is_file())
            ['config.json', 'weights.safetensors']
        """
        return checkpoint.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", finite: bool = True) -> Self:
        """Read what `save` wrote; runs no code but installed entry points.

        finite: refuse weights that are NaN or infinite; False allows to inspect such a model.

        Raises:
            CheckpointError: missing or foreign files, tensors or tokenizers, each by name; weights that are no finite numbers.

        Examples:
            >>> folder = model.save("shapes")
            >>> mm.Model.load("shapes").predict("image -> label", image=square).value
            'square'
        """
        return checkpoint.load(cls, Path(folder), finite=finite).to(device).eval()

    def _answer_all(self, task: str, samples: Iterable[Sample], batch: int) -> list[Prediction]:
        """Answers of a head that answers at once, in the order of the samples."""
        head, kind = self.packer.heads[task], self.packer.patterns[task].writes.kind
        answers: list[Prediction] = []
        with preserved_state(), self.inference_mode():
            for part in in_batches(samples, batch):
                stream = self.pack(task, part, answers=False, first=len(answers))
                r = stream.readings[task]
                hidden = {"hidden": r.hidden} if r.hidden else {}
                found = head.answer(self.logits(stream)[task], r.lengths, self.packer.tokenizers[kind], **hidden)
                # a pack holds its samples in another order, by their sizes
                by_number = zip(r.samples, found, strict=True)
                answers += [answer for _, answer in sorted(by_number, key=lambda pair: pair[0])]
        return answers

    def _write_all(
        self,
        task: str,
        samples: Iterable[Sample],
        prefix: CachedPrefix | None,
        batch: int,
        options: Mapping[str, Any],
    ) -> list[Prediction]:
        """Answers that are written token by token, in the order of the samples."""
        found: dict[int, Prediction] = {}
        with preserved_state(), self.inference_mode():
            for piece in self._write(task, samples, prefix, batch, options):
                if piece.prediction is not None:
                    found[piece.ticket] = piece.prediction
        return [found[i] for i in range(len(found))]

    def _write(
        self,
        task: str,
        samples: Iterable[Sample],
        prefix: CachedPrefix | None,
        batch: int,
        options: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """The pieces of all answers; at most one batch of samples is encoded ahead."""
        requests = self._requests(task, samples, prefix, options)
        waiting: deque[Request] = deque()
        before = 0  # number of requests of earlier engines
        while waiting.extend(islice(requests, batch + 1 - len(waiting))) or waiting:
            width, more = waiting[0].width, len(waiting) > batch
            # room for somewhat longer answers, since one that does not fit waits until all others have ended
            capacity = max(request.prompt + request.limit for request in waiting) + 1
            engine = Engine(
                self,
                rows=min(max(batch, width), width * len(waiting)),
                capacity=capacity * 5 // 4 if more else capacity,
            )
            entered = 0
            while engine.busy or (waiting and engine.has_room(waiting[0])):
                while waiting and engine.has_room(waiting[0]) and width <= engine.free_rows:
                    engine.enter(waiting.popleft())
                    entered += 1
                    if not waiting:
                        waiting.extend(islice(requests, 1))
                for piece in engine.step():
                    if piece.error is not None:
                        raise piece.error
                    yield dataclasses.replace(piece, ticket=before + piece.ticket)
            before += entered

    def _requests(
        self, task: str, samples: Iterable[Sample], prefix: CachedPrefix | None, options: Mapping[str, Any]
    ) -> Iterator[Request]:
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
            yield new_request(self.packer, task, sample, f"sample {number}", prefix, own)
        if begins is not None and number + 1 != len(begins):
            refuse(number + 1)

    def _begins(self, task: str, options: Mapping[str, Any]) -> Sequence[Any] | None:
        """The beginning of each answer, one for each sample; None if `begin` holds for all."""
        begin: Any = options.get("begin")
        begins: Any = options.get("begins")
        if begins is None:
            if not isinstance(begin, list):
                return None
            text = self.packer.tokenizers[self.packer.patterns[task].writes.kind].text
            return begin if text else None  # no text is a list
        if begin is not None:
            raise ConfigError(f"task {task!r}: give begin, for every sample, or begins, one for each; not both")
        if isinstance(begins, (str, bytes, Mapping)) or not hasattr(begins, "__len__"):
            raise ConfigError(
                f"task {task!r}: begins={describe(begins)} is no list; give a value for each sample, or None"
            )
        return list(begins)  # by their order: a Series of pandas would be asked by its labels

    def _check_answers_at_once(self, task: str, options: Mapping[str, Any], prefix: CachedPrefix | None) -> None:
        """Refuse options of writing that would change nothing."""
        idle = ("beams", "begin", "begins", "guidance", "length_penalty", "sampler", "stop", "temperature")
        options = {**options, "temperature": options["temperature"] or None}  # with 0 nothing is drawn, as here
        given = [name for name in idle if not _is_default(options[name])]
        if given or prefix is not None:
            raise ConfigError(
                f"task {task!r}: {type(self.packer.heads[task]).__name__} answers at once, so {', '.join(given) or 'prefix'} "
                "has no meaning there"
            )

    def _samples(
        self,
        task: str,
        verb: str,
        samples: Any,
        fields: Mapping[str, Any],
        batch: int,
        prefix: CachedPrefix | None = None,
    ) -> tuple[bool, Iterable[Sample]]:
        """(whether it is a single sample, given by its fields; the samples), checked."""
        self.packer.check_task(task)
        if samples is None:
            self._check_fields(task, verb, fields, prefix.fields if prefix else ())
        elif fields:
            raise ConfigError(f"task {task!r}: give either samples or the fields {', '.join(fields)}, not both")
        check_whole(f"task {task!r}", batch=batch)
        if batch < 1:
            raise ConfigError(f"task {task!r}: batch={batch} must be at least 1")
        if samples is None:
            return True, [fields]
        if isinstance(samples, Mapping):
            raise ConfigError(f"task {task!r}: samples is one mapping; give a list of samples, or its fields by name")
        if isinstance(samples, (str, bytes)) or not (is_indexed(samples) or hasattr(samples, "__iter__")):
            raise ConfigError(
                f"task {task!r}: samples is {type(samples).__name__}; give a list of samples, or anything with a length and "
                "[index], or that can be iterated"
            )
        return False, as_samples(samples)

    def _check_fields(self, task: str, verb: str, fields: Mapping[str, Any], read: Iterable[str]) -> None:
        """Refuse what was given by name and is neither a field of the task nor an option: it would be lost in silence."""
        pattern = self.packer.patterns[task]
        known = [field.name for field in pattern.reads]
        taken = ["samples", "batch"] if verb == "predict" else ["samples", *BY_KEYWORD]
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
            clue = did_you_mean(name, [*known, *BY_KEYWORD])
            if name == pattern.answer:
                clue = ", and writes this; what an answer begins with is given as begin="
            elif name in BY_KEYWORD:
                clue = "; that is an option of generate"
            raise TaskError(f"task {task!r} has no field {name!r}; it reads {', '.join(known) or 'nothing'}{clue}")


def _is_default(option: Any) -> bool:
    """Whether an option of `generate` has the value that it has unless given; arrays have none of these."""
    return option is None or (isinstance(option, (int, float, tuple)) and option in (1, ()))
