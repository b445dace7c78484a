"""The model as users see it: predict, generate, save. Its weights and losses are in network.py."""

import dataclasses
import importlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, overload

import torch
from torch import Tensor

from multimodal import checkpoint
from multimodal.data.frames import as_samples
from multimodal.data.sources import in_batches, is_indexed, samples_or_errors
from multimodal.generate.engine import Engine, Piece
from multimodal.generate.prefix import CachedPrefix, read_prefix
from multimodal.generate.request import Options, Request, new_request
from multimodal.generate.samplers import Sampler
from multimodal.heads import Prediction
from multimodal.network import Network, Sample
from multimodal.notebook import short_form, tables_html
from multimodal.packer import Prepared
from multimodal.process_state import preserved_state
from multimodal.retrieval import match_probabilities, side_vectors
from multimodal.shapes import ConfigError, StreamError, TaskError, check_seed, check_whole, did_you_mean
from multimodal.stream import Stream
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, describe

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}
WINDOW = 4  # batches that `predict_each` reads ahead
NEW = "new"  # the entry of `origin` with the parts whose first weights were random
BY_KEYWORD = [*DEFAULTS, "begins", "prefix", "batch"]  # the keywords of `generate` that are no fields of a sample


class Model(Network):
    """One model for many kinds of data.

    tokenizers: by name of a kind, its tokenizer.
    core: the declaration of the transformer, a `Core` or an `EncoderDecoder`.
    tasks: patterns such as "image -> label", or Task("...", head, weight).
    seed: every part initialises its weights from this seed and its own name, so that one more tokenizer changes no other part.

    Methods (everything else that help() lists comes from torch.nn.Module):
        predict, generate, stream   answer a task, for one sample by keywords or for a list of samples; or piece by piece
        predict_each                answer any number of samples one after the other, in little memory
        read                        read the first fields of a task once, for many answers
        vectors, matches            the vectors of a pair's sides ("image <-> text"), and the probability that two sides match
        save, load, extended        write and read a folder with declarations and weights; add kinds and tasks
        push_to_hub, from_hub       the same with a repository of the Hugging Face hub, which gets a model card too
        from_pretrained, export     begin with trained weights of others; write programs, or weights in the layout of others
        pack, logits, losses, loss  pack samples as a stream, and compute its logits and losses
        forward, embed, rows        the core's states of a stream, and its embedded tokens
        readout, report             the module of a task's head, and the number of parameters by part
        tasks, device, most_tokens, learns_from_rewards   properties of the model
        inference_mode              a context in evaluation mode and without gradients
    `multimodal.fit` trains a model, `multimodal.evaluate` measures it.

    Raises:
        ConfigError, TaskError: the declarations do not fit together.

    Examples:
        >>> shapes = Labels(("circle", "square"))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1), "label": shapes}, mm.Core.tiny(), ["image -> label"])
        >>> run = mm.fit(model, {"image -> label": samples}, steps=2, batch=4, quiet=True)
        >>> answer = model.predict("image -> label", image="square.png")
    """

    def predict(self, task: str, /, samples: Iterable[Sample] | None = None, *, batch: int = 64, **fields: Any) -> Any:
        """The most probable answer: `predict("image -> label", image="cat.png")`, or a list of answers for a list of samples.

        Samples are read `batch` at a time, so that they may be any number of files, or an iterator.

        Returns:
            A Prediction, or a list of them for samples.

        Raises:
            TaskError, ConfigError, StreamError, MediaError: an unknown task, or a sample that does not fit it.

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

    @overload
    def predict_each(
        self,
        task: str,
        /,
        samples: Iterable[Sample | Exception],
        *,
        batch: int = ...,
        errors: Literal["raise"] = ...,
        first: int = ...,
    ) -> Iterator[Prediction]: ...
    @overload
    def predict_each(
        self,
        task: str,
        /,
        samples: Iterable[Sample | Exception],
        *,
        batch: int = ...,
        errors: Literal["yield"],
        first: int = ...,
    ) -> Iterator[Prediction | Exception]: ...
    def predict_each(
        self,
        task: str,
        /,
        samples: Iterable[Sample | Exception],
        *,
        batch: int = 64,
        errors: Literal["raise", "yield"] = "raise",
        first: int = 0,
    ) -> Iterator[Prediction | Exception]:
        """Answer like `predict`, and yield the answers as they come, in the order of the samples: for data of any size.

        `4 * batch` samples are read ahead and ordered by length, so that a batch has samples of like lengths.

        Args:
            batch: number of samples that are answered at the same time.
            errors: "yield": a sample that cannot be read or answered gives its error in the place of an answer, and the others
                are answered. An exception among the samples is that of a sample that its source could not read.
            first: the number that errors give the first sample.

        Raises:
            TaskError, ConfigError: an unknown task or argument, at once. With errors="raise" also what `predict` raises.

        Examples:
            >>> each = model.predict_each("image -> label", ({"image": picture} for picture in (square, "no.png")), errors="yield")
            >>> [answer.value if isinstance(answer, mm.Prediction) else type(answer).__name__ for answer in each]
            ['square', 'MediaError']
        """
        self.packer.check_task(task, answers=True)
        if errors not in ("raise", "yield"):
            raise ConfigError(f"predict_each: errors={errors!r} is neither 'raise' nor 'yield'")
        check_whole("predict_each", first=first)
        _, chosen = self._samples(task, "predict_each", samples, {}, batch)
        return self._answer_each(task, chosen, batch, errors == "raise", first)

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
        ctc: tuple[str, float] | None = None,
        length_penalty: float = 1.0,
        guidance: float = 1.0,
        stop: str | Sequence[str] = (),
        begin: Any = None,
        begins: Sequence[Any] | None = None,
        seed: int = 0,
        lookup: int = 0,
        prefix: CachedPrefix | None = None,
        batch: int = 64,
        **fields: Any,
    ) -> Any:
        """Write an answer token by token: one Prediction for one sample, or a list of them for a list of samples.

        An answer does not depend on the other samples. Decoding is greedy unless a sampler or a temperature above 0 is given; for
        features, temperature scales the noise from which they are sampled (default 1). Options without effect raise an error.

        Args:
            max_tokens: the most tokens of an answer. A kind of a fixed length is always written whole.
            sampler: how the next token is chosen, such as `TopP(0.9)` or `NoRepeat(3) | Temperature(0.8)`.
            temperature: short for `sampler=Temperature(..)`; 0 is greedy.
            beams: number of hypotheses of beam search; the answer is the best by log p / tokens ** length_penalty, and the
                others are in its `others`.
            ctc: a CTC task that reads the same fields and writes the same kind, and its weight w: beams are ranked by
                (1 - w) log p + w log p of the CTC task that a text begins so (Watanabe et al. 2017). The fields are read once.
            length_penalty: from -10 to 10; above 1 favours long answers, below 1 short ones; only with beams.
            guidance: above 1 moves away from what would be written if nothing were read (Ho & Salimans 2022).
            stop: strings that end a text and are not part of it.
            begin: a value with which every answer begins; max_tokens does not count it. A list of texts is one for each sample.
            begins: such a value for each sample, of any kind; None for an answer that begins with nothing.
            seed: sample i is drawn with seed + i.
            lookup: the most tokens that are guessed at once, from what followed the newest tokens where they stood before, in what
                was read or written; 0: none. The answer is the same, and comes sooner where it repeats what was read.
            prefix: the result of `read`.
            batch: number of rows that are decoded at the same time.

        Raises:
            ConfigError: options that do not fit the task.
            StreamError: a sampler rules out every token.

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
            "ctc": ctc,
            "length_penalty": length_penalty,
            "guidance": guidance,
            "stop": stop,
            "begin": begin,
            "begins": begins,
            "seed": seed,
            "lookup": lookup,
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
        """Write like `generate`, and yield each `Piece` of text as soon as it is final.

        The `ticket` of a piece is the number of its sample. The texts of a sample's pieces together are its answer, and its last
        piece has the whole `prediction`.

        options: those of `generate`, or the fields of one sample.
        """
        self.packer.check_task(task, answers=True)
        names = {field.name for field in self.packer.patterns[task].reads}
        fields = {name: options.pop(name) for name in (names & set(options)) - set(BY_KEYWORD)}
        _, chosen = self._samples(task, "stream", samples, fields, batch, prefix)
        return self._write(task, chosen, prefix, batch, options)

    def read(self, task: str, /, **fields: Any) -> CachedPrefix:
        """Read the first fields of a task once, and cache their keys and values; `generate` and `stream` take them as `prefix`.

        Raises:
            ConfigError: the fields are not the first of the task, or they would attend to a later, bidirectional field.
        """
        return read_prefix(self, task, fields)

    def vectors(self, task: str, samples: Sequence[Sample], *, side: str | None = None, batch: int = 64) -> Tensor:
        """Unit vectors (N, F) of one side of each sample, for a pair such as "image <-> text".

        side: "left" or "right"; None: the side whose fields the samples have.

        Raises:
            TaskError: the task is no pair, or the samples have both sides or none and `side` is None.
        """
        _, samples_given = self._samples(task, "vectors", samples, {}, batch)
        return side_vectors(self, task, in_batches(samples_given, batch), side)

    def matches(self, task: str, left: Sequence[Sample], right: Sequence[Sample], *, batch: int = 64) -> Tensor:
        """(N, M): the probability that each left side of a pair matches each right side.

        With a softmax `Contrast` the probabilities of each left side sum to 1; with a sigmoid one each pair has its own.
        """
        sides = ("left", left), ("right", right)
        vectors = [self.vectors(task, samples, side=side, batch=batch) for side, samples in sides]
        return match_probabilities(self, task, *vectors)

    def extended(self, tokenizers: Mapping[str, Tokenizer] | None = None, tasks: Sequence[str | Task] = ()) -> "Model":
        """A model with more kinds and tasks, which has all weights of this one, bit for bit.

        Raises:
            ConfigError: a name that is already taken, or the model has adapters or is quantized.
        """
        if self.adapters is not None:
            raise ConfigError(
                "Model.extended: the model has adapters, which the new one would lose; call lora.merge or lora.remove first"
            )
        if self.quantization is not None:
            raise ConfigError("Model.extended: the model is quantized; extend the original, and quantize that")
        for name in tokenizers or {}:
            if name in self.packer.tokenizers:
                raise ConfigError(f"Model.extended: there is already a tokenizer named {name!r}; choose another name")
        more = Model(
            {**self.packer.tokenizers, **(tokenizers or {})},
            self.core.core,
            [*self.tasks.values(), *tasks],
            seed=self.seed,
        )
        missing, _ = more.to(self.device, self.dtype).load_state_dict(self.state_dict(), strict=False)
        more.origin = self.origin
        if self.origin is not None:
            more.origin = {**self.origin, NEW: [*self._new_parts(), *_parts_of(more, missing)]}
        return more.train(self.training)

    def report(self) -> str:
        """The number of parameters by part, as lines of text.

        Of a model that began with pretrained weights, "(new)" marks the parts that did not.
        """
        lines, new = [], self._new_parts()
        for name, count in self.parameter_counts().items():
            mark = "  (new)" if name in new else "  (new connector)" if f"{name} connector" in new else ""
            lines.append(f"{name:<32}{count:>14,}{mark}")
        return "\n".join(lines)

    def _new_parts(self) -> list[str]:
        """The parts that a model has besides its pretrained ones, as `origin` lists them."""
        new = self.origin.get(NEW) if isinstance(self.origin, Mapping) else None
        return new if isinstance(new, list) else []  # a config.json that was edited by hand may have anything here

    def __repr__(self) -> str:
        tasks = [f"    {pattern}  by {short_form(head)}" for pattern, head in self.packer.heads.items()]
        kinds = [f"    {name}: {short_form(tokenizer)}" for name, tokenizer in self.packer.tokenizers.items()]
        parameters = [f"    {line}" for line in self.report().split("\n")]
        return "\n".join(
            [
                "Model",
                "  tasks",
                *tasks,
                "  tokenizers",
                *kinds,
                f"  core\n    {short_form(self.core.core)}",
                "  parameters",
                *parameters,
            ]
        )

    def _repr_html_(self) -> str:
        """For notebooks: tasks, tokenizers, the core, and parameters by part."""
        counts, packer = self.parameter_counts(), self.packer
        tables = {
            "tasks": [(pattern, short_form(head)) for pattern, head in packer.heads.items()],
            "tokenizers": [(name, short_form(tokenizer)) for name, tokenizer in packer.tokenizers.items()],
            "core": [(short_form(self.core.core),)],
            "parameters": list(counts.items()),
        }
        return tables_html(f"Model, {sum(p.numel() for p in self.parameters()):,} parameters, on {self.device}", tables)

    def save(self, folder: str | Path) -> Path:
        """Write config.json, weights.safetensors and the tokenizers' files, or replace them, all or none; return the folder.

        Raises:
            CheckpointError: the folder has other files and is no checkpoint.
            OSError: writing fails, for instance because the disk is full.

        Examples:
            >>> folder = model.save("shapes")
            >>> sorted(path.name for path in folder.iterdir() if path.is_file())
            ['config.json', 'weights.safetensors']
        """
        return checkpoint.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", finite: bool = True) -> Self:
        """Read what `save` wrote, in evaluation mode; a checkpoint can run no code but that of installed entry points.

        folder: where it was saved; or where there is none, a name on the hub, "owner/model" or "owner/model@revision", as of
            `from_hub`. A name with "hf:" before it is always one of the hub.
        finite: raise on weights that are NaN or infinite; False lets you inspect such a model.

        Raises:
            CheckpointError: files, tensors or classes that are missing, damaged or foreign; weights that are not finite.

        Examples:
            >>> folder = model.save("shapes")
            >>> mm.Model.load("shapes").predict("image -> label", image=square).value
            'square'
        """
        return checkpoint.load(cls, checkpoint.folder_of(folder), finite=finite).to(device).eval()

    @classmethod
    def from_hub(
        cls,
        name: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device = "cpu",
        finite: bool = True,
    ) -> Self:
        """Load what `push_to_hub` pushed. All files are of one commit; without a connection those in the cache are read.

        name: "owner/model". revision: a branch, tag or commit. token: of the hub; None: the one that is stored, if any.
        finite: as of `load`.

        Raises:
            CheckpointError: no such repository, no right to read it, no connection, or no checkpoint of this library.
        """
        folder = checkpoint.folder_from_hub(name, revision, token)
        return checkpoint.load(cls, folder, finite=finite).to(device).eval()

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        message: str | None = None,
        revision: str | None = None,
        run: str | Path | None = None,
        license: str | None = None,
        datasets: Sequence[str] = (),
        limits: str = "",
        overwrite: bool = False,
    ) -> Any:
        """Push this model with a model card to a repository of the Hugging Face hub as one commit; docs/hub.md has more.

        Only config.json, safetensors, the tokenizers' files and README.md go there. Earlier versions stay in the history, and a
        README.md that was changed on the hub by hand stays as it is.

        Args:
            name: "owner/model"; without "owner/" it is that of the token.
            private: None: a new repository is private, and an old one stays as it is.
            token: of the hub; None: the one that `hf auth login` stored, or HF_TOKEN.
            message: of the commit.
            revision: a branch, which is made if it is not there; None: the main one.
            run: the folder of the run that trained it, for the data and the figures of the card.
            license: for the card, as the hub writes it, such as "apache-2.0".
            datasets: for the card, names on the hub of what it was trained on.
            limits: for the card, what the model is not for, and where it is known to fail.
            overwrite: replace the files of another model, or a README.md that was changed there.

        Returns:
            A `multimodal.publish.Published`: the page, the commit, and which files were written.

        Raises:
            ConfigError: no token, no right, no connection, another model under this name, or parts that others cannot load.
        """
        options = {"token": token, "message": message, "revision": revision}
        options |= {"license": license, "datasets": datasets, "limits": limits}
        # by name, because the core must not depend on what stands on it
        room = importlib.import_module("multimodal.publish")
        return room.push(self, name, private=private, run=run, overwrite=overwrite, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        tasks: Sequence[str | Task] = (),
        tokenizers: Mapping[str, Tokenizer] | None = None,
        *,
        keep: Sequence[str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "Model":
        """Load a model that others trained, and add further kinds and tasks with new weights.

        source, options: those of `multimodal.pretrained.pretrained`. The others: those of `Pretrained.model`. The model has its
        pretrained tasks too, unless `keep` says which.

        Raises:
            CheckpointError: a model that cannot be read, or is of an unknown family.

        Examples:
            >>> model = mm.Model.from_pretrained("smollm2", ["text -> label"], {"label": Labels(("question", "answer"))})
            >>> list(model.tasks)
            ['text -> text', 'text -> label']
        """
        # by name, because the core must not depend on the families
        room = importlib.import_module("multimodal.pretrained")
        return room.pretrained(source, **options).model(tasks, tokenizers, keep=keep, seed=seed)

    def export(
        self,
        to: str,
        folder: str | Path,
        *,
        task: str | None = None,
        int8: bool = False,
        data: Sequence[Sample] = (),
        only_original: bool = False,
    ) -> Path:
        """Write the model for another library or runtime, and return the folder.

        to: "onnx" or "pt2" (torch.export): one task as programs that run without this library, see docs/export.md; or the library
            from which the weights came, in whose layout the whole model is written: "hf", transformers, or "timm".
        task: for "onnx" and "pt2", the task; None: the only one.
        int8: for "onnx", programs whose matrices are int8, once those in float32 have passed.
        data: for int8, samples on which they are compared with the model; the manifest says how far they agree.
        only_original: for "hf" and "timm", leave out kinds and tasks that were added to the loaded ones; else they are an error.

        Raises:
            ConfigError: another format, a part that it has no place for, or programs that differ from the model.
            TaskError: no such task. CheckpointError: the folder has files already.
        """
        if to in ("onnx", "pt2"):
            if only_original:
                raise ConfigError(f"Model.export: only_original is for 'hf' and 'timm'; {to!r} writes one task")
            room = importlib.import_module("multimodal.export")
            return room.export(self, to, folder, task, int8=int8, data=data)
        if to not in ("hf", "timm"):
            raise ConfigError(f"Model.export: to={to!r} is unknown; there are 'onnx', 'pt2', 'hf' and 'timm'")
        if task is not None:
            raise ConfigError(f"Model.export: {to!r} takes the whole model, so leave task={task!r} out")
        if int8 or len(data):
            raise ConfigError(f"Model.export: int8 and data are for 'onnx'; {to!r} holds the weights as they are")
        return importlib.import_module("multimodal.pretrained").export(self, folder, to, only_original=only_original)

    def _answer_all(self, task: str, samples: Iterable[Sample], batch: int) -> list[Prediction]:
        """The answers of a head that is not autoregressive, in the order of the samples."""
        answers: list[Prediction] = []
        with preserved_state(), self.inference_mode():
            for part in in_batches(samples, batch):
                answers += self._answers(task, self.pack(task, part, answers=False, first=len(answers)))
        return answers

    def _answers(self, task: str, stream: Stream) -> list[Prediction]:
        """The answers to the samples of a stream of one task, in the order in which they were packed."""
        head, kind = self.packer.heads[task], self.packer.patterns[task].writes.kind
        r = stream.readings[task]
        more = head.answer_inputs(r, stream.position_TA)
        found = head.answer(self.logits(stream)[task], r.lengths, self.packer.tokenizers[kind], **more)
        # a pack holds its samples in another order, by their sizes
        return [answer for _, answer in sorted(zip(r.samples, found, strict=True), key=lambda pair: pair[0])]

    def _answer_each(
        self, task: str, samples: Iterable[Any], batch: int, strict: bool, first: int
    ) -> Iterator[Prediction | Exception]:
        """The answers of `predict_each`: those of a window of samples at a time, so that batches depend on its samples alone."""
        writes = self.packer.heads[task].autoregressive
        for part in in_batches(samples if strict else samples_or_errors(samples), WINDOW * batch):
            found: list[Any] = [None] * len(part)
            ready: list[tuple[int, int, Any]] = []  # (tokens, number in the window, the prepared sample or its request)
            with preserved_state(), self.inference_mode():
                for i, sample in enumerate(part):
                    name = f"sample {first + i}"
                    try:
                        if isinstance(sample, Exception):
                            raise sample
                        if writes:
                            request = new_request(self.packer, task, sample, name, None, {})
                            ready.append((request.prompt, i, request))
                        else:
                            made = self.packer.prepare(task, sample, name, answers=False, random=False)
                            ready.append((made.tokens, i, made))
                    except (ValueError, OSError) as error:
                        if strict:
                            raise
                        found[i] = error
                ready.sort(key=lambda one: one[:2])
                for i, answer in self._answers_by_length(task, ready, batch, strict):
                    found[i] = answer
                # an embedding that fails stops all that were read with it
                for i in [i for _, i, _ in ready if len(ready) > 1 and writes and isinstance(found[i], Exception)]:
                    request = new_request(self.packer, task, part[i], f"sample {first + i}", None, {})
                    ((_, found[i]),) = self._answers_by_length(task, [(0, i, request)], batch, strict)
            first += len(part)
            yield from found

    def _answers_by_length(
        self, task: str, ready: list[tuple[int, int, Any]], batch: int, strict: bool
    ) -> Iterator[tuple[int, Prediction | Exception]]:
        """(number, answer) of samples (tokens, number, prepared sample or request), in any order."""
        if self.packer.heads[task].autoregressive:
            for piece in self._decode((request for _, _, request in ready), batch, strict):
                if (answer := piece.error or piece.prediction) is not None:
                    yield ready[piece.ticket][1], answer
            return
        for start in range(0, len(ready), batch):
            some = ready[start : start + batch]
            answers = self._answers_or_errors(task, [made for _, _, made in some], strict)
            yield from zip([i for _, i, _ in some], answers, strict=True)

    def _answers_or_errors(self, task: str, made: list[Prepared], strict: bool) -> list[Any]:
        """The answers to prepared samples; unless strict, an answer that the kind cannot decode is an error in its place."""
        try:
            return self._answers(task, self.packer.lay(made, answers=False).to(self.device))
        except ValueError as error:
            if strict:
                raise
            if len(made) == 1:
                return [error]
            return [answer for one in made for answer in self._answers_or_errors(task, [one], strict)]

    def _write_all(
        self,
        task: str,
        samples: Iterable[Sample],
        prefix: CachedPrefix | None,
        batch: int,
        options: Mapping[str, Any],
    ) -> list[Prediction]:
        """The answers of an autoregressive head, in the order of the samples."""
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
        """The pieces of all answers, as they are decoded; at most one batch of samples is encoded ahead."""
        return self._decode(self._requests(task, samples, prefix, options), batch)

    def _decode(self, requests: Iterator[Request], batch: int, strict: bool = True) -> Iterator[Piece]:
        """The pieces of requests; unless strict, one that fails has a piece with its error."""
        waiting: deque[Request] = deque()
        before = 0  # number of requests that were entered
        while waiting.extend(islice(requests, batch + 1 - len(waiting))) or waiting:
            width, more = waiting[0].width, len(waiting) > batch
            # some spare capacity if more requests follow: one that does not fit has to wait for a new engine
            capacity = max(request.prompt + request.limit for request in waiting) + 1
            engine = Engine(
                self,
                rows=min(max(batch, width), width * len(waiting)),
                capacity=capacity * 5 // 4 if more else capacity,
            )
            numbers: list[int] = []  # of each ticket of this engine, that of its request
            while engine.busy or (waiting and engine.has_room(waiting[0])):
                while waiting and engine.has_room(waiting[0]) and width <= engine.free_rows:
                    try:
                        engine.enter(waiting.popleft())
                        numbers.append(before)
                    except StreamError as error:  # longer than the model knows
                        if strict:
                            raise
                        yield Piece(before, error=error)
                    before += 1
                    if not waiting:
                        waiting.extend(islice(requests, 1))
                for piece in engine.step():
                    if piece.error is not None and strict:
                        raise piece.error
                    yield dataclasses.replace(piece, ticket=numbers[piece.ticket])

    def _requests(
        self, task: str, samples: Iterable[Sample], prefix: CachedPrefix | None, options: Mapping[str, Any]
    ) -> Iterator[Request]:
        """A request for each sample, which is encoded only when its request is taken."""
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
        """By sample, the value with which its answer begins; None if `begin` is the same for all."""
        begin: Any = options.get("begin")
        begins: Any = options.get("begins")
        if begins is None:
            if not isinstance(begin, list):
                return None
            text = self.packer.answer_tokenizers[task].text
            return begin if text else None  # of other kinds one value may be a list itself
        if begin is not None:
            raise ConfigError(f"task {task!r}: give begin, for every sample, or begins, one for each; not both")
        if isinstance(begins, (str, bytes, Mapping)) or not hasattr(begins, "__len__"):
            raise ConfigError(
                f"task {task!r}: begins={describe(begins)} is no list; give a value for each sample, or None"
            )
        return list(begins)  # a pandas Series would be indexed by its labels

    def _check_answers_at_once(self, task: str, options: Mapping[str, Any], prefix: CachedPrefix | None) -> None:
        """Raise a ConfigError for options of decoding, which have no effect on a head that is not autoregressive."""
        idle = (
            "beams",
            "begin",
            "begins",
            "ctc",
            "guidance",
            "length_penalty",
            "lookup",
            "sampler",
            "stop",
            "temperature",
        )
        options = {**options, "temperature": options["temperature"] or None}  # 0 is greedy, as is predicting
        given = [name for name in idle if not _is_default(name, options[name])]
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
        """Checks the arguments of a method, and returns (whether they are one sample given by keywords, the samples)."""
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
        """Raise a TaskError for a keyword that is neither a field of the task nor an option; else it would be ignored silently."""
        pattern = self.packer.patterns[task]
        known = [field.name for field in pattern.reads]
        taken = ["samples", "batch"] if verb == "predict" else ["samples", *BY_KEYWORD]
        if hidden := [name for name in known if name in taken and name not in read]:
            raise TaskError(
                f"task {task!r} reads a field {hidden[0]!r}, which by keyword is an option of {verb}; give the sample as a "
                f"mapping: {verb}({task!r}, [{{{', '.join(f'{name!r}: ...' for name in known)}}}])"
            )
        if not set(fields) | set(read) >= set(known):
            return  # a field is missing; the error of `check_sample` says more than one about the other keyword
        for name in fields:
            if name in known:
                continue
            clue = did_you_mean(name, [*known, *BY_KEYWORD])
            if name == pattern.answer:
                clue = ", and writes this; what an answer begins with is given as begin="
            elif name in BY_KEYWORD:
                clue = "; that is an option of generate"
            raise TaskError(f"task {task!r} has no field {name!r}; it reads {', '.join(known) or 'nothing'}{clue}")


def _parts_of(model: Network, names: Iterable[str]) -> list[str]:
    """The parts that have these weights, as `parameter_counts` calls them; of a pretrained tower its connector alone."""
    parts = []
    for name in names:
        group, key, *_ = name.split(".")
        if group == "embeds":
            # a tower has weights of its own until it is loaded from a checkpoint
            trained = getattr(model.packer.tokenizers[key], "weights", None) is not None
            parts.append(f"tokenizer {key} connector" if trained else f"tokenizer {key}")
        else:
            parts.append(f"head {key}")
    return list(dict.fromkeys(parts))


def _is_default(name: str, option: Any) -> bool:
    """Whether an option of `generate` has its default value; the types come first, since == of an array is no bool."""
    default = DEFAULTS.get(name)
    plain = (int, float, tuple)
    return option is default or (isinstance(option, plain) and isinstance(default, plain) and option == default)
