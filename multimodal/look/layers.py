"""The states of every layer of a trained model, with the rows that belong to each sample and field."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.composite import Several
from multimodal.core import Block, Transformer
from multimodal.model import Model
from multimodal.packer import Packer
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, StreamError
from multimodal.stream import Stream
from multimodal.tokenizer import Tokenizer, Tokens

START = "start"
"""The name of the learned token that opens a written segment, where others have the name of their field."""


@dataclass(frozen=True)
class States:
    """States by layer of many samples of one task, packed end to end.

    names: the name of each layer, as `layer_names`.
    layers: the states (T, D) of each layer: the core's input, then each block's output. An EncoderDecoder has the layers of its
        reader first; the rows of the other core are NaN.
    fields: names of the fields that have rows.
    sample_T: the index of each row's sample.
    field_T: the index of each row's field in `fields`.
    reading_N: the rows that the task's head reads.
    """

    names: tuple[str, ...]
    layers: tuple[Tensor, ...]
    fields: tuple[str, ...]
    sample_T: Tensor
    field_T: Tensor
    reading_N: Tensor

    def __len__(self) -> int:
        return len(self.layers)

    def rows(self, field: str | None = None, sample: int | None = None) -> Tensor:
        """Indices of the rows of a field, of a sample, or of both, in the order of the stream.

        Raises:
            ConfigError: there is no such field.
        """
        chosen_T = torch.ones_like(self.sample_T, dtype=torch.bool)
        if field is not None:
            if field not in self.fields:
                raise ConfigError(f"States: there is no field {field!r}; there are {', '.join(self.fields)}")
            chosen_T &= self.field_T == self.fields.index(field)
        if sample is not None:
            chosen_T &= self.sample_T == sample
        return chosen_T.nonzero()[:, 0]

    def of(self, layer: int, field: str, *, pool: str = "last") -> Tensor:
        """One state (N, D) a sample, in the order given: the first, the last or the mean of the field's rows.

        Raises:
            StreamError: a sample that lacks the field. ConfigError: another value of `pool`.
        """
        if pool not in ("first", "last", "mean"):
            raise ConfigError(f"States: pool={pool!r} is none of first, last, mean")
        row_T = self.rows(field)
        sample_T = self.sample_T[row_T]
        samples = int(self.sample_T.max()) + 1
        count_N = torch.bincount(sample_T, minlength=samples)
        if not bool(count_N.all()):
            lacking = int((count_N == 0).nonzero()[0, 0])
            raise StreamError(f"States: sample {lacking} has no rows of field {field!r}; leave it out, or pool another")
        # rows of a sample lie together once they are sorted, so that its last one ends its run
        by_sample_T = sample_T.argsort(stable=True)
        row_T, end_N = row_T[by_sample_T], count_N.cumsum(0)
        state_TD = self.layers[layer]
        if pool == "mean":
            sums_ND = torch.zeros(samples, state_TD.shape[1]).index_add(0, sample_T[by_sample_T], state_TD[row_T])
            return sums_ND / count_N[:, None]
        return state_TD[row_T[end_N - 1 if pool == "last" else end_N - count_N]]


def states(
    model: Model, task: str, samples: Sequence[Mapping[str, Any]], *, answers: bool = False, batch: int = 64
) -> States:
    """The states of every layer, for samples of one task.

    answers: whether the answers are in the stream too (teacher forcing). batch: samples in one forward pass.

    Raises:
        TaskError: there is no such task. StreamError: there are no samples.
    """
    packer = model.packer
    packer.check_task(task)
    if not samples:
        raise StreamError("states: there are no samples")
    pattern, head = packer.patterns[task], packer.head(task)
    reads = tuple(field.name for field in pattern.reads)
    fields = (
        reads + (START,) * bool(len(packer.starts[task].tokens)) + (pattern.answer,) * (answers and head.autoregressive)
    )
    batches: list[list[Tensor]] = []
    sample_of, field_of, reading, offset = [], [], [], 0
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        with model.inference_mode(), recorded(model) as layers:
            stream = model.pack(task, part, answers=answers, first=start)
            model(stream)
        batches.append(whole_layers(model, layers, stream))
        r, places = stream.readings[task], stream.layout.info
        index_N = torch.tensor(r.samples) + start
        sample_of.append(index_N[places.sample.long().cpu()])
        segments = [_segments(pattern, sample, fields) for sample in part]
        longest = max(map(len, segments))
        numbers = torch.tensor([each + [-1] * (longest - len(each)) for each in segments])
        field_of.append(numbers[sample_of[-1] - start, places.segment.long().cpu()])
        reading.append(r.row_N.cpu() + offset)
        offset += len(stream)
    return States(
        layer_names(model),
        tuple(torch.cat(parts) for parts in zip(*batches, strict=True)),
        fields,
        torch.cat(sample_of),
        torch.cat(field_of),
        torch.cat(reading),
    )


def _segments(pattern: Pattern, sample: Mapping[str, Any], fields: Sequence[str]) -> list[int]:
    """The field of each value of a sample, as an index of `fields`: fields that are None have no value, lists have several."""
    counts = []
    for field in pattern.reads:
        value = sample[field.name]
        several = value.values if isinstance(value, Several) else value
        counts.append(0 if value is None else len(several) if field.many else 1)
    read = [i for i, count in enumerate(counts) for _ in range(count)]
    return [*read, *range(len(counts), len(fields))]


def transformers(model: Model) -> dict[str, Transformer]:
    """The model's cores by name: "" of a single one, otherwise "reader" and "writer"."""
    core = model.core
    if isinstance(core, Transformer):
        return {"": core}
    return {"reader": core.reader, "writer": core.writer}


def block_name(core: str, index: int) -> str:
    """The name of a core's block, from the core's name and the block's index: "block 1", "writer block 2"."""
    return f"{core} block {index + 1}".strip()


def layer_names(model: Model) -> tuple[str, ...]:
    """ "embedding", "block 1", ..; with two cores "reader embedding", .. before "writer embedding", .."""
    names: list[str] = []
    for name, core in transformers(model).items():
        names += [f"{name} embedding".strip(), *(block_name(name, i) for i in range(len(core.blocks)))]
    return tuple(names)


def layer_number(model: Model, layer: int | str) -> int:
    """The number of a layer from its name or number; negative numbers count from the last.

    Raises:
        ConfigError: there is no such layer.
    """
    names = layer_names(model)
    if isinstance(layer, str) and layer in names:
        return names.index(layer)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return layer % len(names)
    raise ConfigError(f"there is no layer {layer!r}; there are 0 to {len(names) - 1}: {', '.join(names)}")


@contextmanager
def recorded(model: Model) -> Iterator[list[Tensor]]:
    """A list to which each pass within the context adds the first block's input and each block's output (T, D), core by core."""
    found: list[Tensor] = []

    def record_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0].detach())

    def record_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(output.detach())

    hooks = []
    try:
        for core in transformers(model).values():
            hooks.append(core.blocks[0].register_forward_pre_hook(record_input))
            hooks += [block.register_forward_hook(record_output) for block in core.blocks]
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def whole_layers(model: Model, layers: Sequence[Tensor], stream: Stream) -> list[Tensor]:
    """Each layer's states as float32 on the CPU, with a row for every row of the stream; NaN for the other core's.

    A core without rows was not called: all its rows are NaN.
    """
    cores = transformers(model)
    if len(cores) == 1:
        return [state_TD.float().cpu().clone() for state_TD in layers]
    places = stream.layout.info
    # the reader has the first rows of each sample, the writer the others
    reads = torch.tensor([span.read for span in stream.layout.spans], device=places.order.device)
    is_read_T = (places.order < reads[places.sample.long()]).cpu()
    whole, at = [], 0
    for name, core in cores.items():
        here_T = is_read_T if name == "reader" else ~is_read_T
        for width in layer_widths(core):
            state_TD = torch.full((len(stream), width), float("nan"))
            if bool(here_T.any()):
                state_TD[here_T] = layers[at].float().cpu()
                at += 1
            whole.append(state_TD)
    return whole


def layer_widths(core: Transformer) -> list[int]:
    """The width D of the first block's input and of each block's output: blocks whose layers merge by Concat widen the stream."""
    widths = [core.core.width]
    for block in core.blocks:
        assert isinstance(block, Block)
        widths.append(block.width)
    return widths


def read_values(packer: Packer, task: str, sample: Mapping[str, Any]) -> Iterator[tuple[str, str, Tokens]]:
    """(name, kind, tokens) of each value that a sample has of what a task reads; of a list of values "image[0]", "image[1]", .."""
    tokens = packer.encoded(task, sample, "look").tokens
    for field in packer.patterns[task].reads:
        found = tokens[field.name]
        if isinstance(found, Several):
            yield from ((f"{field.name}[{i}]", field.kind, value) for i, value in enumerate(found.values))
        elif found is not None:
            yield field.name, field.kind, found


def picture_and_grid(tokenizer: Tokenizer, tokens: Tokens) -> tuple[Tensor | None, tuple[int, int]]:
    """The picture (Y, X, C) of a value in 0..1, and the rows and columns of the tokens that tile it, all but the learned ones.

    None for a value without a picture, and one that ends within a row, as written pictures may.
    """
    row_N = tokens.position_NA[tokenizer.learned :, 1]
    rows = max(len(row_N.unique()), 1)
    grid = (rows, len(row_N) // rows)
    picture_YXC = tokenizer.picture(tokens) if len(row_N) == grid[0] * grid[1] else None
    return None if picture_YXC is None else picture_YXC.detach().float().clamp(0, 1), grid


def token_labels(tokenizer: Tokenizer, tokens: Tokens) -> list[str]:
    """A short name for each token, as its tokenizer calls it.

    Raises:
        ConfigError: not one name for each token.
    """
    names = tokenizer.token_names(tokens)
    if isinstance(names, str) or len(names) != len(tokens):
        came = "one text" if isinstance(names, str) else f"{len(names)} names"
        raise ConfigError(
            f"{type(tokenizer).__name__}.token_names: gave {came} for {len(tokens)} tokens; give one for each"
        )
    return [str(name) for name in names]
