"""Tokenizers + core + heads = a model: loss, predict, generate, save, load."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal import checkpoint
from multimodal.attention import Backend, Cache
from multimodal.core import Core
from multimodal.generate import write
from multimodal.heads import Head, Prediction, Readout
from multimodal.shapes import ConfigError, StreamError
from multimodal.stream import Packer, Stream, Task
from multimodal.tokenizer import Tokenizer

Sample = Mapping[str, Any]


class Model(nn.Module):
    """One model for many kinds of data.

    tokenizers: name of a kind -> its tokenizer; core: the transformer; tasks: "image -> label" or Task("...", head, weight).
    Every part draws its first weights from `seed` and its own name, so one more tokenizer changes no other part.

    Raises:
        ConfigError, TaskError: something declared does not fit together.
    """

    def __init__(
        self, tokenizers: Mapping[str, Tokenizer], core: Core, tasks: Sequence[str | Task], *, seed: int = 0
    ) -> None:
        super().__init__()
        if isinstance(tasks, (str, Task)):
            tasks = [tasks]
        if not isinstance(core, Core):
            raise ConfigError(f"Model: core is {type(core).__name__}; give a Core, for instance Core.small()")
        for name in tokenizers:
            if not name.isidentifier() or not name.isascii() or hasattr(nn.ModuleDict(), name):
                raise ConfigError(f"Model: a tokenizer cannot be named {name!r}; use a plain word such as 'image'")
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
            made_for = heads.setdefault(key, head)
            if type(made_for) is not type(head) or made_for.vocab(self._written(pattern)) != head.vocab(
                self._written(pattern)
            ):
                raise ConfigError(
                    f"Model: task {pattern!r} would share the weights of another head, {made_for}, which {head} does not fit; "
                    "tasks that write one kind by one class of head share its weights, so give the class another name"
                )
            if key not in self.readouts:
                with _drawn_from(seed, "head", key):
                    self.readouts[key] = head.readout(core.width, self._written(pattern))

    @property
    def device(self) -> torch.device:
        return self.core.norm.weight.device

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by pattern."""
        return self.packer.tasks

    def _written(self, pattern: str) -> Tokenizer:
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
        return self.embeds[kind](content)

    def forward(self, stream: Stream, *, cache: Cache | None = None, backend: Backend = "auto") -> Tensor:
        """States (T, D) of a packed stream."""
        rows = torch.cat([self.embed(kind, content) for kind, content in stream.content.items()])
        if rows.shape[0] != len(stream):
            raise StreamError(
                f"Model: the tokenizers embedded {rows.shape[0]} tokens of {len(stream)}; an embed must give one row a token"
            )
        stream_TD = rows if stream.order_T is None else rows[stream.order_T]
        return self.core(stream_TD, stream.position_TA, stream.layout, cache=cache, backend=backend)

    def logits(self, stream: Stream, *, backend: Backend = "auto") -> dict[str, Tensor]:
        """Logits (rows, V) by task, in the order of `stream.readings`."""
        state_TD = self(stream, backend=backend)
        return {
            pattern: self.packer.head(pattern).logits(self.readout(pattern), state_TD[r.row_N], r.lengths)
            for pattern, r in stream.readings.items()
        }

    def losses(self, stream: Stream, *, backend: Backend = "auto") -> dict[str, Tensor]:
        """Sum of the losses over all real targets, by task; their number is `stream.readings[task].count`."""
        sums = {}
        for pattern, logits in self.logits(stream, backend=backend).items():
            r = stream.readings[pattern]
            if r.target is None:
                raise StreamError(
                    f"task {pattern!r}: this stream was packed without answers; pack it with answers=True"
                )
            sums[pattern] = self.packer.head(pattern).loss(logits, r.lengths, r.target, r.target_lengths)
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

    def predict(self, task: str, samples: Sequence[Sample] | None = None, *, batch: int = 64, **fields: Any) -> Any:
        """The best answer: `predict("image -> label", image="cat.png")`, or a list of answers for a list of samples."""
        if samples is None:
            return self.predict(task, [fields])[0]
        samples = self._check_call(task, samples, fields, batch)
        if self.packer.head(task).writes:
            return self.generate(task, samples, batch=batch)
        answers: list[Prediction | None] = [None] * len(samples)
        with self.resting():
            for start in range(0, len(samples), batch):
                stream = self.pack(task, samples[start : start + batch], answers=False, first=start)
                r = stream.readings[task]
                found = self.packer.head(task).answer(self.logits(stream)[task], r.lengths, self._written(task))
                for index, answer in zip(r.samples, found, strict=True):
                    answers[start + index] = answer
        return answers

    def generate(
        self,
        task: str,
        samples: Sequence[Sample] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 64,
        **fields: Any,
    ) -> Any:
        """Write an answer token by token; temperature 0 takes the likeliest each time. One answer, or a list for a list."""
        if samples is None:
            return self.generate(task, [fields], max_tokens=max_tokens, temperature=temperature, seed=seed)[0]
        samples = self._check_call(task, samples, fields, batch)
        if not self.packer.head(task).writes:
            return self.predict(task, samples, batch=batch)
        answers: list[Prediction] = []
        with self.resting():
            for start in range(0, len(samples), batch):
                part = samples[start : start + batch]
                answers += write(
                    self, task, part, max_tokens=max_tokens, temperature=temperature, seed=seed + start, first=start
                )
        return answers

    def _check_call(self, task: str, samples: Any, fields: Mapping[str, Any], batch: int) -> Sequence[Sample]:
        self.packer.check_task(task)
        if fields:
            raise ConfigError(f"task {task!r}: give either samples or the fields {', '.join(fields)}, not both")
        if batch < 1:
            raise ConfigError(f"task {task!r}: batch={batch} must be at least 1")
        if isinstance(samples, Mapping):
            raise ConfigError(f"task {task!r}: samples is one mapping; give a list of samples, or its fields by name")
        if isinstance(samples, (list, tuple)):
            return samples
        return [samples[i] for i in range(len(samples))] if hasattr(samples, "__len__") else list(samples)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Evaluation mode without gradients, and back."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.inference_mode():
                yield
        finally:
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
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote; runs no code but installed entry points.

        Raises:
            CheckpointError: missing or foreign files, tensors or tokenizers, each by name.
        """
        return checkpoint.load(cls, Path(folder)).to(device).eval()


@contextmanager
def _drawn_from(seed: int, *names: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32("/".join((str(seed), *names)).encode()))
        yield
