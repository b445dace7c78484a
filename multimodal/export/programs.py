"""The programs of a task: which tensors go in and come out, by name, and what is computed between.

classify, transcribe   answer     fields -> logits
embed                  left, right      the fields of a side -> vectors
write                  prefill    fields -> logits, cache          step   a token, cache -> logits, cache
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.encoder_decoder import TwoCores
from multimodal.export.padded import Cached, Known, LayerKeys, ReadField, Rows, core_states, laid_out
from multimodal.heads import CTC, Classify, Contrast, NextToken
from multimodal.heads.base import Segment
from multimodal.heads.contrast import SIDES, ContrastReadout
from multimodal.layers import Sublayer
from multimodal.network import Network
from multimodal.shapes import ConfigError, ShapeError
from multimodal.tokenizer import Tokens
from multimodal.tower import TowerEmbed

FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool
NEXT = ".next"
"""What follows the name of an output that is an input, of the name before it, of the next step."""
PLACE = "positions of these tokens, as the tokenizer gives them: time, row, column"


@dataclass(frozen=True)
class Entry:
    """A tensor that goes into a program or comes out of it.

    axes: the size of each axis, or the name of one that may have any size.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]
    meaning: str


class Program(nn.Module):
    """Tensors by name -> tensors by name.

    name: that of its file.
    inputs, outputs: what goes in, and what comes out.
    """

    name: str
    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a ShapeError unless the inputs have the sizes of their axes; while it is traced, this makes equal sizes one."""
        known: dict[str, int] = {}
        for entry in self.inputs:
            for axis, size in zip(entry.axes, inputs[entry.name].shape, strict=True):
                wanted = axis if isinstance(axis, int) else known.setdefault(axis, size)
                if size != wanted:
                    raise ShapeError(
                        f"{self.name}: {entry.name} is {tuple(inputs[entry.name].shape)}: {axis} is {wanted}"
                    )


class Reading(Program):
    """A program that reads the fields of a task, or of one side of a pair."""

    def __init__(
        self, model: Network, task: str, fields: Sequence[ReadField], start: Segment, name: str, writes: bool = False
    ) -> None:
        super().__init__()
        self.name, self.task, self.fields, self.start = name, task, fields, start
        self.head = model.packer.heads[task]
        kinds = [field.kind for field in fields] + [model.packer.patterns[task].fields[-1].kind] * writes
        self.model = with_parts(model, task, kinds)
        self.inputs = tuple(entry for field in fields for entry in _entries(model, field)) or (
            Entry("answers", INT, ("batch",), "a number for each answer, of any value: this task reads nothing"),
        )

    def states(self, inputs: Mapping[str, Tensor]) -> tuple[Rows, Tensor, int, Cached]:
        """The rows, their states (B, T, D), how many of the rows are context, and what is cached."""
        self.check(inputs)
        rows, cached = laid_out(self.model, self.fields, self.start, inputs), Cached({}, {})
        context = rows.stream_BTD.shape[1] - len(self.start.tokens)
        return rows, core_states(self.model.core, rows, context, cached), context, cached


class Classification(Reading):
    """The logits of every class."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__(model, task, read_fields(model, task), model.packer.starts[task], "answer")
        classes = self.model.readout(task).linear.out_features
        self.outputs = (Entry("logits", FLOAT, ("batch", classes), "a logit for each of the labels"),)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(self.head, Classify)
        rows, state_BTD, context, _ = self.states(inputs)
        readout = self.model.readout(self.task)
        if self.head.pool is None:
            return {"logits": self.head.logits(readout, state_BTD[:, -1], ())}
        order_BT, read_B = _order(rows.known[:context])
        vector_BD = self.head.pool.padded(state_BTD[:, :context], order_BT, read_B, readout.pool)
        return {"logits": readout.linear(vector_BD)}


class Transcription(Reading):
    """The logits of a symbol or a blank for every token that was read."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__(model, task, read_fields(model, task), model.packer.starts[task], "answer")
        classes = self.model.readout(task).linear.out_features
        self.outputs = (
            Entry("logits", FLOAT, ("batch", "rows", classes), "for each row a logit for each symbol, the blank last"),
            Entry("rows", BOOL, ("batch", "rows"), "which rows are tokens that were read, and not padding"),
        )

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, _ = self.states(inputs)
        logits = self.head.logits(self.model.readout(self.task), state_BTD[:, :context].flatten(0, 1), ())
        return {"logits": logits.view(-1, context, logits.shape[-1]), "rows": rows.known.there_BT[:, :context]}


class Vectors(Reading):
    """The unit vectors of one side of a pair."""

    def __init__(self, model: Network, task: str, side: str) -> None:
        head, start = model.packer.heads[task], model.packer.starts[task]
        assert isinstance(head, Contrast)
        content = torch.tensor([SIDES.index(side)] if head.pools is None else [], dtype=torch.long)
        start = Segment(start.kind, Tokens(content, torch.zeros(len(content), 3)), (1.0, 1.0, 1.0), False)
        super().__init__(model, task, read_fields(model, task, side), start, side)
        self.side = side
        self.outputs = (Entry("vectors", FLOAT, ("batch", head.width), f"a unit vector of each {side} side"),)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, _ = self.states(inputs)
        readout = self.model.readout(self.task)
        assert isinstance(readout, ContrastReadout)
        pool, weights = readout.pool_of(self.side)
        if pool is None:
            return {"vectors": readout.mapped(state_BTD[:, -1], self.side)}
        order_BT, read_B = _order(rows.known[:context])
        return {"vectors": readout.mapped(pool.padded(state_BTD[:, :context], order_BT, read_B, weights), self.side)}


class Prefill(Reading):
    """What was read becomes the cache; the logits of the first token."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__(model, task, read_fields(model, task), model.packer.starts[task], "prefill", writes=True)
        self.outputs = (_logits(self.model, task), *_renamed(cache_entries(self.model)))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, cached = self.states(inputs)
        known = rows.known
        # the last token of the start, or without a start the last one that was read, whose row differs from sample to sample
        newest_BT = known.there_BT & (known.info.order == known.total_B[:, None] - 1)
        newest_B = newest_BT.long().argmax(1)
        sample_B = torch.arange(newest_B.shape[0])
        time_B = rows.position_BTA[sample_B, newest_B, 0] + 1
        if isinstance(self.model.core, TwoCores):  # time in the writer starts at its first token
            time_B = time_B - rows.position_BTA[:, context, 0]
        logits = self.head.logits(self.model.readout(self.task), state_BTD[sample_B, newest_B], ())
        segment_B = known.info.segment[sample_B, newest_B] + 1
        state = {"answer.time": time_B, "answer.segment": segment_B, **_as_tensors(cached)}
        return {"logits": logits} | {name + NEXT: x for name, x in state.items()}


class Step(Program):
    """One more token of each answer, and the logits of the token after it."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__()
        self.name, self.task, self.head = "step", task, model.packer.heads[task]
        self.kind = model.packer.patterns[task].fields[-1].kind
        self.place_step = model.packer.answer_tokenizers[task].step
        self.model = with_parts(model, task, [self.kind])
        cache = cache_entries(self.model)
        self.inputs = (
            Entry("token", INT, ("batch",), "the id that was written last"),
            Entry(
                "token.place", FLOAT, ("batch", 3), "position of this token: the last row of tokenizer.places(count)"
            ),
            *cache,
        )
        grows = [entry for entry in cache if "cached" in entry.axes]
        self.outputs = (_logits(self.model, task), *_renamed(grows, "cached_and_new"))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.check(inputs)
        keys, memory = _layers(inputs, "cache"), _layers(inputs, "memory")
        cached = Cached(keys, memory, Known.from_numbers(inputs["cache.tokens"]))
        if "memory.tokens" in inputs:
            cached.memory_known = Known.from_numbers(inputs["memory.tokens"])
        assert cached.known is not None
        position_B1A = (inputs["token.place"] / torch.tensor(self.place_step))[:, None]
        position_B1A = position_B1A + inputs["answer.time"][:, None, None] * torch.tensor([1.0, 0.0, 0.0])
        order_B1 = cached.known.total_B[:, None]
        known = Known.of(
            order_B1,
            torch.zeros_like(order_B1),
            inputs["answer.segment"][:, None],
            torch.ones_like(order_B1, dtype=BOOL),
        )
        rows = Rows(self.model.embed(self.kind, inputs["token"])[:, None], position_B1A, known)
        state_BTD = core_states(self.model.core, rows, 0, cached)
        logits = self.head.logits(self.model.readout(self.task), state_BTD[:, 0], ())
        return {"logits": logits} | {
            name + NEXT: x for name, x in _as_tensors(cached).items() if name.startswith("cache.")
        }


def programs_of(model: Network, task: str) -> tuple[Program, ...]:
    """The programs of a task.

    Raises:
        ConfigError: a part of the model that no program can be made of; says which, and what to do.
    """
    head, packer = model.packer.heads[task], model.packer
    makers = {Classify: (Classification,), CTC: (Transcription,), NextToken: (Prefill, Step)}
    where = f"export of {task!r}"
    if type(head) is not Contrast and type(head) not in makers:
        raise ConfigError(
            f"{where}: tasks of {type(head).__name__} cannot be exported; those of Classify, CTC, Contrast and NextToken can: use "
            "Model.save, and this library where it runs"
        )
    pattern = packer.patterns[task]
    for kind in dict.fromkeys(field.kind for field in pattern.reads):
        if (module := _not_padded(model.embeds[kind])) is not None:
            raise ConfigError(
                f"{where}: the embedding of {kind!r} ({type(packer.tokenizers[kind]).__name__}: {type(module).__name__}) depends "
                "on where the tokens of a whole value stand, and does not say how it embeds padded ones; write `padded` of its "
                "module (Tokenizer.embed says what it takes), or use a tokenizer that embeds each token by itself"
            )
    if head.autoregressive and (kind := pattern.fields[-1].kind) in packer.reads_places:
        raise ConfigError(
            f"{where}: the embedding of {kind!r} ({type(packer.tokenizers[kind]).__name__}) depends on where the tokens of a whole "
            "value stand, and a program writes them one by one; use a tokenizer that embeds each token by itself"
        )
    inside = [module for field in pattern.fields for module in model.embeds[field.kind].modules()]
    towers = [module.frozen_part.core for module in inside if isinstance(module, TowerEmbed)]
    sublayers = [(one.core, module) for one in (model.core, *towers) for module in one.modules()]
    for core, sublayer in sublayers:
        if isinstance(sublayer, Sublayer) and sublayer.layer.state(*_sizes(core, sublayer)) is not None:
            raise ConfigError(
                f"{where}: {type(sublayer.layer).__name__} carries a state from token to token, which a padded program cannot do; "
                "use attention in its place"
            )
    two = isinstance(model.core, TwoCores)
    if two and (not pattern.reads or (head.autoregressive and not len(packer.starts[task].tokens))):
        raise ConfigError(
            f"{where}: with an EncoderDecoder a program needs a field that is read and a start of what is written; name a field "
            "before '->', and leave start_ids of NextToken out"
        )
    if model.dtype != FLOAT:
        kind = str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"{where}: the weights are {kind}; programs compute in float32: call model.float() first")
    if type(head) is Contrast:
        return tuple(Vectors(model, task, side) for side in SIDES)
    return tuple(make(model, task) for make in makers[type(head)])


def _not_padded(module: nn.Module) -> nn.Module | None:
    """The part of an embedding that depends on places and cannot embed padded values; None: there is none."""
    if isinstance(module, TowerEmbed):
        return _not_padded(module.frozen_part.embed)
    return module if getattr(module, "reads_places", False) and not hasattr(module, "padded") else None


def _sizes(core: Any, sublayer: Sublayer) -> tuple:
    """What `Layer.state` takes: the settings of the sublayer's core, and the width of its stream."""
    return getattr(core, "writer", core), sublayer.in_width


def with_parts(model: Network, task: str, kinds: Sequence[str]) -> Network:
    """A view of the model that has the modules of one task alone; else a program would hold the weights of all others."""
    part, key = copy.copy(model), model.packer.keys[task]
    part._modules = {
        "embeds": nn.ModuleDict({kind: model.embeds[kind] for kind in dict.fromkeys(kinds)}),
        "core": model.core,
        "readouts": nn.ModuleDict({key: model.readouts[key]}),
    }
    return part


def read_fields(model: Network, task: str, side: str | None = None) -> list[ReadField]:
    """The fields that a task reads; of a pair, those of one side."""
    pattern, tokenizers = model.packer.patterns[task], model.packer.tokenizers
    fields = pattern.reads if side is None else pattern.sides[side]
    return [
        ReadField(field.name, field.kind, tokenizers[field.kind].step, not tokenizers[field.kind].causal)
        for field in fields
    ]


def cache_entries(model: Network) -> tuple[Entry, ...]:
    """What is cached of each answer while it is written."""
    core = model.core.writer if isinstance(model.core, TwoCores) else model.core
    numbers = "order, bidirectional, segment of each token; the order of what is no token is -1"
    entries = [
        Entry("answer.time", FLOAT, ("batch",), "the time in steps from which the positions of the answer count"),
        Entry("answer.segment", INT, ("batch",), "the number of the answer among the fields of its sample"),
    ]
    for name, axis, sizes in (("cache", "cached", core.key_sizes), ("memory", "memory", core.memory_sizes)):
        if sizes or name == "cache":
            entries.append(Entry(f"{name}.tokens", INT, ("batch", axis, 3), numbers))
        for i, keys in enumerate(sizes):
            axes = ("batch", axis, keys.heads)
            entries.append(Entry(f"{name}.k{i}", FLOAT, (*axes, keys.key_width), f"keys of attention layer {i}"))
            entries.append(Entry(f"{name}.v{i}", FLOAT, (*axes, keys.value_width), f"values of attention layer {i}"))
    return tuple(entries)


def _as_tensors(cached: Cached) -> dict[str, Tensor]:
    found = {}
    for name, layers, known in (
        ("cache", cached.keys, cached.known),
        ("memory", cached.memory, cached.memory_known),
    ):
        if known is not None:
            found[f"{name}.tokens"] = known.as_numbers()
        for i, pair in sorted(layers.items()):
            found |= {f"{name}.{part}{i}": x for part, x in zip("kv", pair, strict=True)}
    return found


def _layers(inputs: Mapping[str, Tensor], name: str) -> LayerKeys:
    count = sum(key.startswith(f"{name}.k") for key in inputs)
    return {i: (inputs[f"{name}.k{i}"], inputs[f"{name}.v{i}"]) for i in range(count)}


def _renamed(entries: Sequence[Entry], cached: str = "cached") -> Iterator[Entry]:
    """The same as outputs, which the next step takes as inputs."""
    for entry in entries:
        axes = tuple(cached if axis == "cached" else axis for axis in entry.axes)
        yield Entry(entry.name + NEXT, entry.dtype, axes, entry.meaning)


def _entries(model: Network, field: ReadField) -> Iterator[Entry]:
    """The inputs of one field."""
    tokenizer, axes = model.packer.tokenizers[field.kind], ("batch", f"{field.name}_tokens")
    if tokenizer.vocab_size is not None:
        yield Entry(field.name, INT, axes, "ids of its tokens, padded with 0")
    else:
        yield Entry(field.name, FLOAT, (*axes, tokenizer.feature_size or 0), "features of its tokens, padded with 0")
    yield Entry(f"{field.name}.place", FLOAT, (*axes, 3), PLACE)
    yield Entry(f"{field.name}.length", INT, ("batch",), "its number of tokens; 0 for a sample that lacks this field")


def _logits(model: Network, task: str) -> Entry:
    symbols = model.readout(task).linear.out_features
    return Entry("logits", FLOAT, ("batch", symbols), "a logit for each id that may be written next")


def _order(known: Known) -> tuple[Tensor, Tensor]:
    """What `Pool.padded` takes: the order of the rows, and the number of tokens."""
    total_B = known.total_B
    return torch.where(known.there_BT, known.info.order, total_B[:, None]), total_B
