"""Compares the programs of a task with the packed model, on three batches of random samples or on samples of the user."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal.attention import Mechanism
from multimodal.core import Transformer
from multimodal.encoder_decoder import TwoCores
from multimodal.export.padded import ReadField
from multimodal.export.programs import INT, NEXT, FieldProgram, Program, Vectors
from multimodal.heads.pool import Pool
from multimodal.network import Network
from multimodal.positions import on_axes, steps_of
from multimodal.retrieval import side_vectors
from multimodal.shapes import AXES, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, written_tokens
from multimodal.tower import Tower

SHAPES = ((1, 3), (2, 11), (3, 6))
"""(number of samples, most tokens of a field) of each batch; all differ from `example_inputs`, with which programs are traced."""
STEPS = 3  # decoding steps that are compared
BATCH = 16  # samples of the user in one batch

Sample = Mapping[str, Tokens | None]
RunProgram = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]
"""Runs a program: (its name, its inputs by name) -> its outputs by name."""


def example_inputs(program: Program) -> dict[str, Tensor]:
    """Zeros as inputs for tracing; all dynamic axes have different sizes."""
    sizes: dict[str, int] = {}
    for entry in program.inputs:
        for axis in entry.axes:
            if isinstance(axis, str):
                sizes.setdefault(axis, 2 if axis == "batch" else 5 + 2 * len(sizes))
    shape = {entry.name: [sizes[a] if isinstance(a, str) else a for a in entry.axes] for entry in program.inputs}
    return {entry.name: torch.zeros(shape[entry.name], dtype=entry.dtype) for entry in program.inputs}


def largest_difference(model: Network, task: str, programs: Sequence[Program], run: RunProgram) -> float:
    """The largest difference of programs and model on random samples, relative to the largest output (or to 1); NaN gives inf."""
    random, worst = torch.Generator().manual_seed(0), 0.0
    with model.inference_mode():
        for program in programs:
            if not isinstance(program, FieldProgram):
                continue
            for count, most in SHAPES:
                samples = list(_random_samples(model, program, count, most, random))
                for found, wanted in _outputs(model, task, program, samples, run, random):
                    size = wanted.abs().max().clamp(min=1)
                    difference = (
                        float((found - wanted).abs().max() / size) if found.shape == wanted.shape else torch.inf
                    )
                    worst = max(worst, difference if difference == difference else torch.inf)
    return worst


def agreement(
    model: Network, task: str, programs: Sequence[Program], run: RunProgram, data: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How far programs and model agree on samples of the user, as JSON values.

    For logits "same", the share of rows with the same argmax; for vectors "cosine", the smallest cosine similarity.
    """
    random, read = torch.Generator().manual_seed(0), [p for p in programs if isinstance(p, FieldProgram)]
    rows, same, cosine, worst = 0, 0, 1.0, 0.0
    with model.inference_mode():
        for start in range(0, len(data), BATCH):
            part = [data[i] for i in range(start, min(start + BATCH, len(data)))]
            for program in read:
                samples = [_encoded(model, task, sample, start + i) for i, sample in enumerate(part)]
                for found, wanted in _outputs(model, task, program, samples, run, random):
                    size = wanted.abs().max().clamp(min=1)
                    worst = max(worst, float((found - wanted).abs().max() / size))
                    if isinstance(program, Vectors):
                        cosine = min(cosine, float((found * wanted).sum(-1).min()))
                        rows += len(found)
                    else:
                        rows += len(found.reshape(-1, found.shape[-1]))
                        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    measure = {"cosine": cosine} if isinstance(read[0], Vectors) else {"same": same / max(rows, 1)}
    return {"samples": len(data), "rows": rows, **measure, "largest": worst}


def _encoded(model: Network, task: str, sample: Mapping[str, Any], number: int) -> Sample:
    """The tokens of the fields that the task reads, and of the answer if the sample has one. number: of the sample, for errors."""
    pattern, tokenizers = model.packer.patterns[task], model.packer.tokenizers
    pattern.check_sample(sample, answer=False)
    kinds = {field.name: field.kind for field in pattern.reads}
    if pattern.answer and sample.get(pattern.answer) is not None:
        kinds[pattern.answer] = pattern.writes.kind
    found: dict[str, Tokens | None] = {}
    for name, kind in kinds.items():
        try:
            found[name] = None if sample[name] is None else tokenizers[kind](sample[name], empty=name == pattern.answer)
        except ValueError as error:
            raise MediaError(f"sample {number} of task {task!r}, field {name!r}: {error}") from None
    return found


def _outputs(
    model: Network,
    task: str,
    program: FieldProgram,
    samples: Sequence[Sample],
    run: RunProgram,
    random: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (output of the programs, output of the model) for these samples."""
    given = padded_inputs(model, program.fields, samples)
    out = run(program.name, given)
    if isinstance(program, Vectors):
        yield out["vectors"], side_vectors(model, task, [samples], program.side)
    elif model.packer.heads[task].autoregressive:
        yield from _decoding_outputs(model, task, samples, out, run, random)
    else:
        wanted = _packed_logits(model, task, samples)
        if "rows" not in out:
            yield out["logits"], torch.cat(wanted)
            return
        for logits, there, rows in zip(out["logits"], out["rows"], wanted, strict=True):
            yield logits[there], rows


def _decoding_outputs(
    model: Network,
    task: str,
    samples: Sequence[Sample],
    out: dict[str, Tensor],
    run: RunProgram,
    random: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    tokenizer = model.packer.answer_tokenizers[task]
    answers = [sample.get(model.packer.patterns[task].answer) for sample in samples]
    count = min(STEPS, tokenizer.length or STEPS, *(len(tokens) or STEPS for tokens in answers if tokens is not None))
    id_BN = torch.randint(tokenizer.vocab_size or 1, (len(samples), count), generator=random)
    for id_N, tokens in zip(id_BN, answers, strict=True):
        if tokens is not None and len(tokens):
            id_N.copy_(tokens.content[:count])
    written = [written_tokens(tokenizer, id_N) for id_N in id_BN]
    place_BNA = torch.stack([tokens.position_NA for tokens in written])
    wanted = _packed_logits(model, task, samples, written)
    yield out["logits"], torch.stack([rows[0] for rows in wanted])
    state = {}
    for i in range(count):
        state |= {name.removesuffix(NEXT): x for name, x in out.items() if name.endswith(NEXT)}
        token = {"token": id_BN[:, i], "token.place": place_BNA[:, i]}
        out = run("step", token | state)
        yield out["logits"], torch.stack([rows[i + 1] for rows in wanted])


def _packed_logits(
    model: Network, task: str, samples: Sequence[Sample], begins: Sequence[Tokens] | None = None
) -> list[Tensor]:
    """For each sample, the logits (N, V) of the packed model. begins: tokens that each answer begins with."""
    stream = model.packer([(task, sample) for sample in samples], answers=False, begins=begins)
    reading, logits = stream.readings[task], model.logits(stream)[task]
    rows = [1] * len(samples) if len(logits) == len(samples) else list(reading.lengths)
    found = dict(zip(reading.samples, logits.split(rows), strict=True))
    return [found[i] for i in range(len(samples))]


def padded_inputs(model: Network, fields: Sequence[ReadField], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The inputs of a program that reads these fields: tokens of the samples, padded with zeros."""
    inputs = {}
    for field in fields:
        tokenizer, values = model.packer.tokenizers[field.kind], [sample[field.name] for sample in samples]
        count = max(1, *(0 if tokens is None else len(tokens) for tokens in values))
        one = torch.zeros(count, dtype=INT) if tokenizer.vocab_size else torch.zeros(count, tokenizer.feature_size or 0)
        content = one.repeat(len(samples), *[1] * one.dim())
        place = torch.zeros(len(samples), count, len(tokenizer.axes))
        for i, tokens in enumerate(values):
            if tokens is not None:
                content[i, : len(tokens)], place[i, : len(tokens)] = tokens.content, tokens.position_NA
        length_B = torch.tensor([0 if tokens is None else len(tokens) for tokens in values])
        inputs |= {field.name: content, f"{field.name}.place": place, f"{field.name}.length": length_B}
    return inputs or {"answers": torch.zeros(len(samples), dtype=INT)}


def _random_samples(
    model: Network, program: FieldProgram, count: int, most: int, random: torch.Generator
) -> Iterator[dict[str, Tokens | None]]:
    """Samples of random tokens. With several fields, one sample in a batch of three lacks a field."""
    fields, pattern = program.fields, model.packer.patterns[program.task]
    least, known = _fewest_tokens(program), _most_positions(model)
    tokenizers = [model.packer.tokenizers[field.kind] for field in fields if field.kind in model.packer.reads_places]
    least = max([least, *(tokenizer.learned + 1 for tokenizer in tokenizers)])
    room = most if known is None else (known - len(program.start.tokens) - STEPS) // max(len(fields), 1)
    most = max(least, min(most + least - 1, room))
    for i in range(count):
        lacks = fields[most % len(fields)].name if len(fields) > 1 and i == 1 and count == 3 else None
        sample: dict[str, Any] = {field.name: None for field in pattern.reads}
        for field in fields:
            # the first sample is the longest, so that the others are padded
            tokens = most if i == 0 else int(torch.randint(least, most + 1, (), generator=random))
            if field.name != lacks:
                tokenizer, grid = model.packer.tokenizers[field.kind], field.kind in model.packer.reads_places
                sample[field.name] = _random_tokens(tokenizer, tokens, random, grid)
        yield sample


def _random_tokens(tokenizer: Tokenizer, count: int, random: torch.Generator, grid: bool) -> Tokens:
    """Random tokens. grid: whether the embedding needs a whole grid: at most `count` tokens, first the learned ones, if any."""
    if isinstance(tokenizer, Tower):
        inner, connector = tokenizer.tokenizer, tokenizer.connector
        side = getattr(connector, "side", getattr(getattr(connector, "then", None), "side", 0))
        others = getattr(connector, "count", 1)  # `Dropped` needs as many other tokens as it drops
        count += inner.learned + others * max(side, 1) ** 2
        return tokenizer.grouped(_random_grid(inner, min(count, getattr(connector, "most", count)), random, side))
    if grid:
        return _random_grid(tokenizer, count, random)
    index_N = torch.arange(count)
    further = [index_N // n % 2 for n in range(2, len(tokenizer.axes) - 1)]  # those behind time, row and column
    return _random_content(tokenizer, torch.stack([index_N, index_N // 3, index_N % 3, *further], -1), random)


def _random_grid(tokenizer: Tokenizer, count: int, random: torch.Generator, side: int = 0) -> Tokens:
    """At most `count` tokens: the learned ones, then a grid of at least one.

    side: divides rows and columns of the grid of a picture, whose tokens have one time; 0: tokens have increasing times.
    """
    square, own = max(side, 1), count - tokenizer.learned
    columns = min(int(torch.randint(2, 5, (), generator=random)), max(own // square**2, 1)) * square
    rows = max(own // columns // square, 1) * square
    index_N = torch.arange(rows * columns)
    time_N = torch.zeros_like(index_N) if side else index_N
    place_NA = torch.stack([time_N + tokenizer.learned, index_N // columns, index_N % columns], -1)
    first_NA = torch.zeros(tokenizer.learned, 3, dtype=torch.long)
    first_NA[:, 0] = torch.arange(tokenizer.learned)
    position_NA = on_axes(torch.cat([first_NA, place_NA]), AXES, tokenizer.axes)
    return _random_content(tokenizer, position_NA, random)


def _random_content(tokenizer: Tokenizer, position_NA: Tensor, random: torch.Generator) -> Tokens:
    """Random tokens at these positions, which are in steps."""
    count, place_NA = len(position_NA), position_NA * steps_of(tokenizer.step, position_NA.shape[1])
    if tokenizer.vocab_size is not None:
        return Tokens(torch.randint(tokenizer.vocab_size, (count,), generator=random), place_NA)
    return Tokens(torch.randn(count, tokenizer.feature_size or 0, generator=random), place_NA)


def read_bounds(model: Network, program: FieldProgram) -> tuple[int, int | None]:
    """The least and the most tokens of one sample that the model would read, over all fields; a program answers anyway."""
    most, core, start = model.most_tokens, model.core, len(program.start.tokens)
    if isinstance(core, TwoCores):
        reads = [m for m in core.reader.modules() if isinstance(m, Mechanism)]
        if start:  # else the answer is read off the states of the reader
            reads += [m for m in core.writer.modules() if isinstance(m, Mechanism) and not m.name.endswith(" self")]
        found = [part.most for m in reads if not m.name.endswith("memory") for part in (m.score, *m.priors, *m.factors)]
        most = min((one for one in (core.reader.core.learned_times, *found) if one is not None), default=None)
    elif most is not None:
        most -= start
    # what is written may stand alone behind a start
    least = 0 if not program.fields or (program.head.autoregressive and start) else _fewest_tokens(program)
    return least, most


def most_written(model: Network, task: str) -> int | None:
    """The most tokens of an answer that a writer of its own supports; with one core they count among those of the sample."""
    core = model.core
    if not isinstance(core, TwoCores):
        return None
    own = [m for m in core.writer.modules() if isinstance(m, Mechanism) and m.name.endswith(" self")]
    found = [part.most for m in own for part in (m.score, *m.priors, *m.factors)]
    most = min((one for one in (core.writer.core.learned_times, *found) if one is not None), default=None)
    return None if most is None else most - len(model.packer.starts[task].tokens)


def _most_positions(model: Network) -> int | None:
    """The most tokens that every attention layer and position table supports; None: there is no limit."""
    layers = [m for m in model.core.modules() if isinstance(m, Mechanism) and not m.name.endswith("memory")]
    tables = [m.core.learned_times for m in model.core.modules() if isinstance(m, Transformer)]
    bounds = [part.most for m in layers for part in (m.score, *m.priors, *m.factors)] + tables
    return min((most for most in bounds if most is not None), default=None)


def _fewest_tokens(program: FieldProgram) -> int:
    """The fewest tokens of a field that the head's pool accepts."""
    pool: Any = getattr(program.head, "pool", None)
    pools = [pool] if isinstance(pool, Pool) else list(pool or ())
    pools += [pool.of for pool in pools if hasattr(pool, "of")]
    return 1 + max((getattr(pool, "skip", 0) for pool in pools), default=0)
