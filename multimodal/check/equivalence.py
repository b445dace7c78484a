"""single = batch = packed = cached, measured on the user's own model; and no gradient between packed samples."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multimodal.attention import Backend
from multimodal.check.measure import (
    TOLERANCE,
    allowed,
    content_or_value,
    difference,
    logits_by_sample,
    same_answer,
    sample_gradients,
)
from multimodal.check.values import Encoded, plausible_values, random_tokens
from multimodal.composite import Composite, Several
from multimodal.generate import Engine, Greedy, Sampler
from multimodal.generate.request import new_request
from multimodal.generate.samplers import Written
from multimodal.heads import EachRow, Pointer, one_class
from multimodal.heads.base import encode_read
from multimodal.model import Model, Sample
from multimodal.packer import Packer
from multimodal.pattern import Pattern
from multimodal.positions import in_steps, on_axes
from multimodal.process_state import preserved_state
from multimodal.stream import Stream
from multimodal.tokenizer import Tokenizer, Tokens

MOST_SAMPLES = 8  # of each task
FEWEST_SAMPLES = 4  # invented ones are added up to this number, so that there is something to pack with
WRITTEN = 16  # tokens of a greedy answer

CHECKS = {
    "batch": "alone, and four times side by side",
    "packed": "alone, and packed with all others of its task in shuffled order",
    "mixed": "alone, and packed with all samples of all tasks",
    "dense": "packed: the attention in use, and the dense oracle",
    "cached": "written step by step with the cache, and read in one pass without it",
    "answers": "answers alone that are not those in a batch of unequal prompts",
    "gradient": "of one sample with respect to the rows of another in the same pack, in training mode",
}


@dataclass(frozen=True)
class Measurement:
    """One check of one subject.

    subject: the task, and the only field that was read where it is one of several.
    check: a name in `CHECKS`.
    difference: the largest difference found: of logits or gradients; for "answers" the number of answers that differ.
    allowed: the largest difference that passes.
    """

    subject: str
    check: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.subject}, {self.check} ({CHECKS[self.check]}): {self.difference:.3g}, allowed {self.allowed:.3g}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a table.

    rows: one measurement for each check of each subject.
    samples: number of samples of each subject.
    notes: what was invented or left out.
    """

    rows: tuple[Measurement, ...]
    samples: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every measurement passed."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements that did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    def cells(self) -> list[list[str]]:
        """The table as text: a header, then a line for each subject."""
        checks = [check for check in CHECKS if any(row.check == check for row in self.rows)]
        lines = [["", "read -> written", "samples", *checks]]
        for subject, count in self.samples.items():
            found = {row.check: row for row in self.rows if row.subject == subject}
            verdict = "ok" if all(row.passed for row in found.values()) else "FAIL"
            lines.append(
                [verdict, subject, str(count), *(_cell(found[c]) if c in found else "-" for c in checks)],
            )
        return lines

    def remarks(self) -> list[str]:
        """What the table means, what was invented, what failed."""
        lines = [
            f"Largest difference of fp32 logits, of what is allowed: {TOLERANCE:g} times the largest logit (or 1), or four times "
            "what float32 itself takes from float64, where that is more. The gradient between samples must be 0."
        ]
        lines += [f"Note: {note}" for note in self.notes]
        lines += [f"FAIL: {row}" for row in self.failures]
        return [*lines, "passed" if self.passed else "FAILED"]

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*table, *self.remarks()])


def _cell(row: Measurement) -> str:
    text = f"{row.difference:.1e} of {row.allowed:.1e}" if row.difference else "0"
    if row.check == "answers":
        text = f"{row.difference:.0f} differ" if row.difference else "same"
    return text if row.passed else text + " !"


@dataclass(frozen=True)
class _Subject:
    """A line of the table: samples of one task, or with only one of its fields read; already as tokens."""

    name: str
    task: str
    samples: tuple[dict[str, Tokens | None], ...]

    @property
    def batch(self) -> list[tuple[str, Sample]]:
        return [(self.task, sample) for sample in self.samples]


@preserved_state()
def verify(
    model: Model,
    samples: Mapping[str, Sequence[Sample]] | None = None,
    *,
    backend: Backend = "auto",
    seed: int = 0,
) -> Verification:
    """Run every check of `CHECKS` on every task, and on every kind a task of several fields reads by itself.

    samples: by task; the first eight are used. What is missing (tasks, answers, other samples to pack with) is invented, which the
    notes say. The model is measured in fp32, and its modes, buffers and weights are unchanged afterwards.
    seed: of what is invented and of the order of packs.

    Raises:
        TaskError, MediaError: the samples given do not fit their task.

    Examples:
        >>> found = verify(model, {"image -> label": samples, "image -> text": samples})
        >>> found.passed
        True
    """
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
    subjects, notes = _subjects(model.packer, samples or {}, seed)
    twin = copy.copy(model)  # the same weights behind a packer that takes values already encoded
    encoded = {
        # a composite takes tokens as they are; parts that name a kind need the tokenizer of that name
        name: tokenizer if isinstance(tokenizer, Composite) else Encoded(tokenizer)
        for name, tokenizer in model.packer.tokenizers.items()
    }
    twin.packer = Packer(encoded, list(model.tasks.values()), model.packer.axes)
    twin.packer.reads_places = model.packer.reads_places
    # everything in one pack, once, and then each subject by itself
    mixed = [pair for subject in subjects for pair in subject.batch]
    rows: list[Measurement] = []
    with _preserved(model, seed):
        twin.eval()
        with torch.inference_mode():
            in_mixed = iter(_logits(twin, mixed, backend, seed))
            for subject in subjects:
                here = [next(in_mixed) for _ in subject.samples]
                rows += _compare(twin, subject, here if len(subjects) > 1 else None, backend, seed)
        twin.train()
        for subject, gradient in zip(subjects, _cross_gradients(twin, subjects, backend), strict=True):
            rows.append(Measurement(subject.name, "gradient", gradient, 0.0))
    return Verification(tuple(rows), {s.name: len(s.samples) for s in subjects}, tuple(notes))


def _compare(
    model: Model, subject: _Subject, in_mixed: list[Tensor] | None, backend: Backend, seed: int
) -> Iterator[Measurement]:
    """Everything that needs no gradient."""
    rows = list(_rows(model, subject, in_mixed, backend, seed))
    # large logits lose digits in float32 by themselves, which is no fault of packing: the bound is widened to what rounding does
    if any(not row.passed and row.check != "answers" for row in rows):
        noise = _noise(model, subject, backend)
        yield from (
            row if row.check == "answers" else dataclasses.replace(row, allowed=max(row.allowed, 4 * noise))
            for row in rows
        )
    else:
        yield from rows


def _noise(model: Model, subject: _Subject, backend: Backend) -> float:
    """The largest effect of rounding on a logit: each sample alone in float32 and float64; 0 if float64 is not supported."""
    try:
        exact = copy.deepcopy(model).double()
        pairs = [(_logits(model, [x], backend)[0], _logits(exact, [x], backend)[0]) for x in subject.batch]
        gaps = [float((a - b).abs().max()) for a, b in pairs]
    except (RuntimeError, TypeError):  # a user's embedding or layer may support float32 only
        return 0.0
    return max(gaps) if all(map(math.isfinite, gaps)) else 0.0


def _rows(
    model: Model, subject: _Subject, in_mixed: list[Tensor] | None, backend: Backend, seed: int
) -> Iterator[Measurement]:
    batch = subject.batch
    alone = [_logits(model, [pair], backend)[0] for pair in batch]
    four = [_logits(model, [pair] * 4, backend) for pair in batch]
    packed = _logits(model, batch, backend, seed)
    yield _row(subject, "batch", [x for many in four for x in many], [x for x in alone for _ in range(4)])
    yield _row(subject, "packed", packed, alone)
    if in_mixed is not None:
        yield _row(subject, "mixed", in_mixed, alone)
    yield _row(subject, "dense", packed, _logits(model, batch, "dense", seed))
    if model.packer.patterns[subject.task].pair:
        return
    # alone and in a batch of unequal prompts: a cache that mixes rows or counts positions wrongly shows in one of them
    if model.packer.head(subject.task).autoregressive:
        one_by_one = [_written(model, subject.task, [sample]) for sample in subject.samples]
        together = _written(model, subject.task, subject.samples)
        cached = [one for part in one_by_one for one in part] + together
        uncached = [
            _read_again(model, subject.task, sample, one, backend)
            for sample, one in zip(subject.samples * 2, cached, strict=True)
        ]
        yield _row(subject, "cached", [one.chosen_by for one in cached], uncached)
        answers = [part[0].tokens.content for part in one_by_one], [one.tokens.content for one in together]
    else:
        single = [model.predict(subject.task, [sample])[0] for sample in subject.samples]
        together = model.predict(subject.task, subject.samples)
        answers = list(map(content_or_value, single)), list(map(content_or_value, together))
    different = sum(not same_answer(a, b) for a, b in zip(*answers, strict=True))
    yield Measurement(subject.name, "answers", different, 0)


def _logits(
    model: Model, batch: Sequence[tuple[str, Sample]], backend: Backend, shuffle: int | None = None
) -> list[Tensor]:
    """Logits of every sample of a pack, in the order of `batch`; with `shuffle` they are packed in another order."""
    order = list(range(len(batch)))
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(order)
    packed = logits_by_sample(model, model.packer([batch[i] for i in order]).to(model.device), backend)
    found = dict(zip(order, packed, strict=True))
    return [found[i] for i in range(len(batch))]


def _row(subject: _Subject, check: str, ours: list[Tensor], wanted: list[Tensor]) -> Measurement:
    gaps = torch.tensor([difference(a, b) for a, b in zip(ours, wanted, strict=True)])
    return Measurement(subject.name, check, float(gaps.max()), allowed(*wanted))  # max() of tensors lets NaN through


class _Recorded(Sampler):
    """Greedy; records the log-probabilities it chose by."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        self.seen.append(logits_BV[0].clone())
        return Greedy()(logits_BV, written)


class _Written(NamedTuple):
    """Written tokens, the numbers by which each token and the end were chosen (see `_read_again`), and the chosen ids."""

    tokens: Tokens
    chosen_by: Tensor
    ids: list[int]


def _written(model: Model, task: str, samples: Sequence[Sample]) -> list[_Written]:
    """The answers of all samples, written in one batch."""
    head = model.packer.head(task)
    asked = [
        new_request(
            model.packer,
            task,
            sample,
            f"sample {i}",
            None,
            {"max_tokens": WRITTEN, **({"temperature": 0.0} if head.draws_features else {"sampler": _Recorded()})},
        )
        for i, sample in enumerate(samples)
    ]
    # a sampler for each request records only its own rows, where one for all would not know whose they are
    engine = Engine(model, rows=len(asked), capacity=max(a.prompt + a.limit for a in asked) + 1)
    for answer in asked:
        engine.enter(answer)
    found = {}
    for piece in engine.run():
        if piece.error is not None:
            raise piece.error
        if piece.prediction is not None:
            found[piece.ticket] = piece.prediction.tokens
    by = [a.options.sampler for a in asked]
    return [
        _Written(
            tokens,
            torch.stack(by[i].seen) if isinstance(by[i], _Recorded) else _features(model, task, tokens),
            asked[i].ids,
        )
        for i, tokens in sorted(found.items())
    ]


def _features(model: Model, task: str, tokens: Tokens) -> Tensor:
    tokenizer = model.packer.answer_tokenizers[task]
    return tokens.content[:, : tokenizer.written_features]


def _read_again(model: Model, task: str, sample: Sample, written: _Written, backend: Backend) -> Tensor:
    """In one pass without a cache: log-probabilities (ids + 1, V) of a written answer, or features (N, F) drawn without noise."""
    tokenizer = model.packer.answer_tokenizers[task]
    head, readout, tokens = model.packer.head(task), model.readout(task), written.tokens
    stream = model.packer([(task, sample)], answers=False, begins=[tokens if len(tokens) else None])
    # a value does not say which of two equal elements was pointed at, but the written ids do
    source = head.source(model.packer.encoded(task, sample, "verify"))
    if source is not None and written.ids:
        place_MA = on_axes(in_steps(source.position_NA, tokenizer.step), tokenizer.axes, model.packer.axes)
        stream = _pointed(stream, task, place_MA, written.ids)
    stream = stream.to(model.device)
    if head.draws_features:
        state_ND = model(stream, backend=backend)[stream.readings[task].row_N[: len(tokens)]]
        noise_NF = state_ND.new_zeros(len(tokens), tokenizer.written_features or 0)
        return head.draw(readout, state_ND, noise_NF, temperature=0.0)[0].float().cpu()
    log_p_NV = model.logits(stream, backend=backend)[task].float().log_softmax(-1)
    if tokenizer.length is not None:  # a kind of a fixed length neither stops before it nor chooses at its end
        log_p_NV = log_p_NV[: len(tokens)].clone()
        log_p_NV[:, -1] = float("-inf")
    return log_p_NV.cpu()


def _pointed(stream: Stream, task: str, place_MA: Tensor, ids: list[int]) -> Stream:
    """A stream whose answer points at these positions; of equal elements the packer would take the first."""
    reading = stream.readings[task]
    assert reading.pointed_N is not None
    pointed_N, place_TA = torch.tensor(ids), stream.position_TA.clone()
    place_TA[reading.row_N[1:]] += place_MA[pointed_N] - place_MA[reading.pointed_N]
    readings = {task: dataclasses.replace(reading, pointed_N=pointed_N)}
    return dataclasses.replace(stream, position_TA=place_TA, readings=readings)


def _cross_gradients(model: Model, subjects: Sequence[_Subject], backend: Backend) -> Iterator[float]:
    """Per subject, the largest gradient of one of its samples with respect to anything of another sample of the mixed pack."""
    batch = [pair for subject in subjects for pair in subject.batch]
    largest = torch.zeros(len(batch))
    for sample, by_kind in sample_gradients(model, model.packer(batch).to(model.device), backend):
        gaps = torch.tensor([0.0, *(others for _, others in by_kind.values())])
        largest[sample] = torch.maximum(largest[sample], gaps.max())
    for part in largest.split([len(subject.samples) for subject in subjects]):
        yield float(part.max())


@contextmanager
def _preserved(model: Model, seed: int) -> Iterator[None]:
    """Restores modes, buffers (a batch norm in an embedding changes them) and global generators."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])


def _subjects(packer: Packer, given: Mapping[str, Sequence[Sample]], seed: int) -> tuple[list[_Subject], list[str]]:
    """The lines of the table, and notes on what was invented or left out."""
    for task in given:
        packer.check_task(task)
    subjects, notes = [], []
    invented: dict[str, str] = {}
    for task, pattern in packer.patterns.items():
        mine = list(given.get(task, ()))
        if len(mine) > MOST_SAMPLES:
            notes.append(f"{task!r}: the first {MOST_SAMPLES} of {len(mine)} samples were used")
        ready = [_as_tokens(packer, task, packer.completed(task, sample)) for sample in mine[:MOST_SAMPLES]]
        ready += [{} for _ in range(FEWEST_SAMPLES - len(ready))]
        head, pair = packer.head(task), pattern.pair
        pointer = isinstance(head, Pointer)
        for name in [field.name for field in pattern.reads] + ([] if pair else [pattern.answer]):
            lacking = [i for i, sample in enumerate(ready) if name not in sample]
            if pointer and name == pattern.answer:  # its answers are made of what is read
                for i in lacking:
                    ready[i][name] = packer.head(task).source(packer.encoded(task, ready[i], "verify"))
                continue
            if isinstance(head, EachRow) and name == pattern.answer:  # as many as there are rows; any will do
                ready = _answered(packer, task, ready)
                continue
            filling, how = _filling(packer, task, pattern, name, seed) if lacking else ([], "")
            if lacking and any(field.many and field.name == name for field in pattern.reads):
                step = packer.tokenizers[next(f.kind for f in pattern.reads if f.name == name)].step
                filling = [Several(filling[i : i + count], step) for i, count in enumerate((1, 2, 3, 2))]
            for place, i in enumerate(lacking):
                ready[i][name] = filling[place % len(filling)]
            if lacking and how:
                invented[name] = how + (", beside what was given" if len(lacking) < len(ready) else "")
        if not ready:
            notes.append(f"{task!r}: left out, as no row of what was invented has an answer; give samples of it")
            continue
        subjects.append(_Subject(task, task, tuple(ready)))
        if pair:
            notes.append(
                f"{task!r}: compared are the unit vectors of both sides; it answers nothing, so there is nothing to write"
            )
        # each field of several is also read alone, as the others could hide what is wrong with it
        for field in pattern.reads if len(pattern.reads) > 1 and not pointer and not pair else ():
            others = dict.fromkeys(f.name for f in pattern.reads if f.name != field.name)
            # without None, and without empty lists
            only = [{**sample, **others} for sample in ready if len(sample[field.name] or ())]
            only = _answered(packer, task, only) if isinstance(head, EachRow) else only
            if only and (field.name == pattern.answer or not pattern.hides):
                subjects.append(_Subject(f"{task} (only {field.name})", task, tuple(only)))
    if invented:
        notes.append("invented: " + ", ".join(f"{name} ({how})" for name, how in invented.items()))
    return subjects, notes


def _answered(packer: Packer, task: str, samples: list[dict[str, Tokens | None]]) -> list[dict[str, Tokens | None]]:
    """Samples of a head that answers row by row, each with an answer, without those that have no row to answer in."""
    pattern, head = packer.patterns[task], packer.head(task)
    assert isinstance(head, EachRow)
    answers = [head.any_answer(packer.encoded(task, sample, "verify")) for sample in samples]
    return [{**x, pattern.answer: answer} for x, answer in zip(samples, answers, strict=True) if len(answer)]


def _as_tokens(packer: Packer, task: str, sample: Sample) -> dict[str, Tokens | None]:
    """Encode what a given sample has of its task's fields; an answer matters only where it is read back (`writes`)."""
    pattern = packer.patterns[task]
    pattern.check_sample(sample, answer=False)
    fields = {field.name: field.kind for field in pattern.reads}
    if packer.head(task).autoregressive and pattern.answer in sample:
        fields[pattern.answer] = pattern.writes.kind
    many = {field.name: field for field in pattern.reads if field.many}
    return {
        name: encode_read(packer.tokenizers[kind], many[name], sample[name], "verify")
        if name in many
        else None
        if sample[name] is None
        else _tokenizer(packer, task, name, kind)(sample[name], empty=not pattern.pair and name == pattern.answer)
        for name, kind in fields.items()
    }


def _tokenizer(packer: Packer, task: str, name: str, kind: str) -> Tokenizer:
    """The tokenizer of a field; of a composite that is written, the one that writes it."""
    written = packer.written_parts.get(kind) if name == packer.patterns[task].answer else None
    return packer.tokenizers[kind] if written is None else written


def _filling(packer: Packer, task: str, pattern: Pattern, name: str, seed: int) -> tuple[list[Tokens], str]:
    """Tokens for a field that was not given, and in a few words where they come from ('': they change nothing)."""
    kinds = {field.name: field.kind for field in pattern.reads}
    if not pattern.pair:
        kinds |= {pattern.answer: pattern.writes.kind}
    tokenizer = _tokenizer(packer, task, name, kinds[name])
    if name not in [field.name for field in pattern.reads] and not packer.head(task).autoregressive:
        return [one_class(0, tokenizer)], ""  # not part of the stream: any target will do
    # a kind of fixed length writes only values of that length
    written = not pattern.pair and name == pattern.answer and tokenizer.length is not None
    seed += sum(map(ord, name))  # two fields of one kind get different values
    if values := plausible_values(packer.tokenizers[kinds[name]], seed=seed):
        tokens = [tokenizer(value) for value in values]
        if pattern.hides and name == pattern.answer:  # of one token no part can be hidden
            tokens = [t for t in tokens if len(t) > 1] or random_tokens(tokenizer, seed)
        if not written or all(len(t) == tokenizer.length for t in tokens):
            return tokens, f"{type(values[0]).__name__} values"
    return random_tokens(tokenizer, seed), "random tokens, as no candidate value was accepted"
