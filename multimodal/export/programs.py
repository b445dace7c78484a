"""The programs of a task: modules from tensors by name to tensors by name.

head            program        inputs -> outputs
Classify, CTC   answer         fields -> logits
Contrast        left, right    the fields of that side -> vectors
NextToken       prefill        fields -> logits of the first token, KV cache
                step           a token, KV cache -> logits of the next token, KV cache
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.composite import Composite
from multimodal.encoder_decoder import TwoCores
from multimodal.export.padded import Cached, LayerKeys, ReadField, Rows, TokenInfo, core_states, lay_out
from multimodal.heads import CTC, Classify, Contrast, NextToken
from multimodal.heads.base import Segment
from multimodal.heads.contrast import SIDES, ContrastReadout
from multimodal.layers import Sublayer
from multimodal.network import Network
from multimodal.positions import in_steps, on_axes
from multimodal.relations import named_relations
from multimodal.shapes import ConfigError, ShapeError
from multimodal.tokenizer import Tokens, at_times
from multimodal.tower import TowerEmbed

FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool
NEXT = ".next"
"""Suffix of outputs that are inputs of the next step: the output "X.next" is its input "X"."""
MATRICES = 6
"""Matrices (tokens, tokens) of float32 a head that onnxruntime holds at once, measured: scores, their sum with the mask, the
softmax, its copy without NaN, and what it takes ahead. The room of one layer is used again for the next."""
PLACE = "positions of these tokens, as the tokenizer gives them: {}"


@dataclass(frozen=True)
class Entry:
    """An input or output of a program.

    axes: for each axis its size, or a name if the size is dynamic.
    meaning: a description for the manifest.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]
    meaning: str


class Program(nn.Module):
    """A module from tensors by name to tensors by name.

    name: the name of its file, without the suffix.
    inputs, outputs: its tensors.
    """

    name: str
    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a ShapeError unless the inputs have the declared sizes. In tracing, this makes axes of one name the same symbol."""
        sizes: dict[str, int] = {}
        for entry in self.inputs:
            for axis, size in zip(entry.axes, inputs[entry.name].shape, strict=True):
                wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
                if size != wanted:
                    raise ShapeError(
                        f"{self.name}: {entry.name} is {tuple(inputs[entry.name].shape)}; wanted {wanted} for the axis {axis}"
                    )


class FieldProgram(Program):
    """A program that reads the fields of a task, or of one side of a pair.

    writes: whether it also needs the embedding of the answer's kind.
    """

    def __init__(
        self, model: Network, task: str, fields: Sequence[ReadField], start: Segment, name: str, writes: bool = False
    ) -> None:
        super().__init__()
        self.name, self.task, self.fields, self.start = name, task, fields, start
        self.head = model.packer.heads[task]
        kinds = [field.kind for field in fields] + [model.packer.patterns[task].fields[-1].kind] * writes
        self.model = task_view(model, task, kinds)
        self.inputs = tuple(entry for field in fields for entry in _entries(model, field)) or (
            Entry("answers", INT, ("batch",), "one number of any value for each answer, since this task reads nothing"),
        )

    def states(self, inputs: Mapping[str, Tensor]) -> tuple[Rows, Tensor, int, Cached]:
        """Return (embedded rows, their states (B, T, D), number of rows that were read, KV cache)."""
        self.check(inputs)
        rows, cached = lay_out(self.model, self.fields, self.start, inputs), Cached({}, {})
        context = rows.stream_BTD.shape[1] - len(self.start.tokens)
        return rows, core_states(self.model.core, rows, context, cached), context, cached


class Classification(FieldProgram):
    """The logits (B, V) of the classes."""

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
        order_BT, read_B = _order(rows.token_info[:context])
        vector_BD = self.head.pool.padded(state_BTD[:, :context], order_BT, read_B, readout.pool)
        return {"logits": readout.linear(vector_BD)}


class Transcription(FieldProgram):
    """The CTC logits (B, T, V), the blank last, for every token that was read."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__(model, task, read_fields(model, task), model.packer.starts[task], "answer")
        classes = self.model.readout(task).linear.out_features
        self.outputs = (
            Entry("logits", FLOAT, ("batch", "rows", classes), "for each row a logit for each symbol, the blank last"),
            Entry("rows", BOOL, ("batch", "rows"), "which rows are tokens, not padding"),
        )

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, _ = self.states(inputs)
        logits = self.head.logits(self.model.readout(self.task), state_BTD[:, :context].flatten(0, 1), ())
        return {"logits": logits.view(-1, context, logits.shape[-1]), "rows": rows.token_info.valid_BT[:, :context]}


class Vectors(FieldProgram):
    """The vectors (B, F) of length 1 of one side of a pair."""

    def __init__(self, model: Network, task: str, side: str) -> None:
        head, start = model.packer.heads[task], model.packer.starts[task]
        assert isinstance(head, Contrast)
        content = torch.tensor([SIDES.index(side)] if head.pools is None else [], dtype=torch.long)
        start = Segment(start.kind, Tokens(content, at_times(torch.zeros(len(content)))), (1.0, 1.0, 1.0), False)
        super().__init__(model, task, read_fields(model, task, side), start, side)
        self.side = side
        self.outputs = (Entry("vectors", FLOAT, ("batch", head.width), f"a vector of length 1 for each {side} side"),)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, _ = self.states(inputs)
        readout = self.model.readout(self.task)
        assert isinstance(readout, ContrastReadout)
        pool, weights = readout.pool_of(self.side)
        if pool is None:
            return {"vectors": readout.mapped(state_BTD[:, -1], self.side)}
        order_BT, read_B = _order(rows.token_info[:context])
        return {"vectors": readout.mapped(pool.padded(state_BTD[:, :context], order_BT, read_B, weights), self.side)}


class Prefill(FieldProgram):
    """Reads the fields into the KV cache; the logits (B, V) of the first token."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__(model, task, read_fields(model, task), model.packer.starts[task], "prefill", writes=True)
        self.outputs = (_logits(self.model, task), *_next_outputs(cache_entries(self.model)))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, state_BTD, context, cached = self.states(inputs)
        token_info = rows.token_info
        # the last start token, or without start tokens the last token that was read, whose row differs between samples
        newest_BT = token_info.valid_BT & (token_info.mask_info.order == token_info.total_B[:, None] - 1)
        newest_B = newest_BT.long().argmax(1)
        sample_B = torch.arange(newest_B.shape[0])
        time_B = rows.position_BTA[sample_B, newest_B, 0] + 1
        if isinstance(self.model.core, TwoCores):  # time in the writer starts at its first token
            time_B = time_B - rows.position_BTA[:, context, 0]
        logits = self.head.logits(self.model.readout(self.task), state_BTD[sample_B, newest_B], ())
        segment_B = token_info.mask_info.segment[sample_B, newest_B] + 1
        state = {"answer.time": time_B, "answer.segment": segment_B, **_as_tensors(cached)}
        return {"logits": logits} | {name + NEXT: x for name, x in state.items()}


class Step(Program):
    """Reads one more token of each answer; the logits (B, V) of the token after it."""

    def __init__(self, model: Network, task: str) -> None:
        super().__init__()
        self.name, self.task, self.head = "step", task, model.packer.heads[task]
        self.kind = model.packer.patterns[task].fields[-1].kind
        self.tokenizer = model.packer.answer_tokenizers[task]
        self.model = task_view(model, task, [self.kind])
        cache = cache_entries(self.model)
        self.inputs = (
            Entry("token", INT, ("batch",), "the last id of each answer so far"),
            Entry(
                "token.place",
                FLOAT,
                ("batch", len(self.tokenizer.axes)),
                "position of this token: tokenizer.next_place, which is the last row of tokenizer.places(count) in most kinds",
            ),
            *cache,
        )
        grows = [entry for entry in cache if "cached" in entry.axes]
        self.outputs = (_logits(self.model, task), *_next_outputs(grows, "cached_and_new"))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.check(inputs)
        keys, memory = _layer_keys(inputs, "cache"), _layer_keys(inputs, "memory")
        cached = Cached(keys, memory, TokenInfo.from_numbers(inputs["cache.tokens"]))
        if "memory.tokens" in inputs:
            cached.memory_info = TokenInfo.from_numbers(inputs["memory.tokens"])
        assert cached.token_info is not None
        place_BA = in_steps(inputs["token.place"], self.tokenizer.step)
        position_B1A = on_axes(place_BA, self.tokenizer.axes, self.model.packer.axes)[:, None]
        position_B1A = position_B1A + F.pad(inputs["answer.time"][:, None, None], (0, position_B1A.shape[-1] - 1))
        order_B1 = cached.token_info.total_B[:, None]
        token_info = TokenInfo.of(
            order_B1,
            torch.zeros_like(order_B1),
            inputs["answer.segment"][:, None],
            torch.ones_like(order_B1, dtype=BOOL),
        )
        rows = Rows(self.model.embed(self.kind, inputs["token"])[:, None], position_B1A, token_info)
        state_BTD = core_states(self.model.core, rows, 0, cached)
        logits = self.head.logits(self.model.readout(self.task), state_BTD[:, 0], ())
        return {"logits": logits} | {
            name + NEXT: x for name, x in _as_tensors(cached).items() if name.startswith("cache.")
        }


def pair_bytes(program: FieldProgram) -> int:
    """Bytes that the attention of a layer takes for each pair of tokens of a sample, in a program that no kernel fuses."""
    model = program.model
    towers = [module for embed in model.embeds.values() for module in embed.modules() if isinstance(module, TowerEmbed)]
    # a token of a tower is as many inner tokens as its connector has slots
    cores = [(model.core, 1), *((t.frozen_part.core, t.frozen_part.tower.connector.slots) for t in towers)]
    layers: list[Any] = [(m, slots) for core, slots in cores for m in core.modules() if hasattr(m, "mechanism")]
    return max((MATRICES * 4 * layer.heads * slots**2 for layer, slots in layers), default=0)


def programs_of(model: Network, task: str) -> tuple[Program, ...]:
    """The programs of a task.

    Raises:
        ConfigError: a part of the model cannot be exported; the message says which, and what to do.
    """
    head, packer = model.packer.heads[task], model.packer
    makers = {Classify: (Classification,), CTC: (Transcription,), NextToken: (Prefill, Step)}
    where = f"export of {task!r}"
    if type(head) is not Contrast and type(head) not in makers:
        raise ConfigError(
            f"{where}: tasks of {type(head).__name__} cannot be exported, only those of Classify, CTC, Contrast and NextToken; use "
            "Model.save, and run this library instead"
        )
    pattern = packer.patterns[task]
    for field in pattern.reads:
        if field.many:
            raise ConfigError(
                f"{where}: {field.name!r} takes a list of any number of values ('{field.kind}*'); programs take one value a field: "
                "name as many fields as there are values"
            )
    for kind in dict.fromkeys(field.kind for field in pattern.fields):
        if isinstance(packer.tokenizers[kind], Composite):
            raise ConfigError(
                f"{where}: {kind!r} ({type(packer.tokenizers[kind]).__name__}) has tokens of several parts, whose number and order "
                "differ from value to value; programs take kinds of one part: give each part a field of its own"
            )
    for kind in dict.fromkeys(field.kind for field in pattern.reads):
        if (module := _unpaddable_part(model.embeds[kind])) is not None:
            raise ConfigError(
                f"{where}: the embedding of {kind!r} ({type(packer.tokenizers[kind]).__name__}: {type(module).__name__}) depends "
                "on where all tokens of a value are, and has no method for padded values; write `padded` of its "
                "module (see Tokenizer.embed), or use a tokenizer that embeds each token by itself"
            )
    if head.autoregressive and (kind := pattern.fields[-1].kind) in packer.reads_places:
        raise ConfigError(
            f"{where}: the embedding of {kind!r} ({type(packer.tokenizers[kind]).__name__}) depends on where all tokens of a "
            "value are, but a program generates them one by one; use a tokenizer that embeds each token by itself"
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
    for field in pattern.reads:
        if names := set(named_relations(model.core.core)) & set(packer.tokenizers[field.kind].relations):
            raise ConfigError(
                f"{where}: the core reads the relations {', '.join(sorted(names))} of {field.kind!r}, and a program takes no pairs "
                "of tokens; use Model.save, and this library where it runs"
            )
    two = isinstance(model.core, TwoCores)
    if two and (not pattern.reads or (head.autoregressive and not len(packer.starts[task].tokens))):
        raise ConfigError(
            f"{where}: with an EncoderDecoder a program needs a field to read and a start token of the answer; name a field "
            "before '->', and leave out start_ids of NextToken"
        )
    if model.dtype != FLOAT:
        kind = str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"{where}: the weights are {kind}; programs compute in float32: call model.float() first")
    if type(head) is Contrast:
        return tuple(Vectors(model, task, side) for side in SIDES)
    return tuple(make(model, task) for make in makers[type(head)])


def _unpaddable_part(module: nn.Module) -> nn.Module | None:
    """The part of an embedding that depends on positions and has no method `padded`; None: there is none."""
    if isinstance(module, TowerEmbed):
        return _unpaddable_part(module.frozen_part.embed)
    return module if getattr(module, "reads_places", False) and not hasattr(module, "padded") else None


def _sizes(core: Any, sublayer: Sublayer) -> tuple:
    """The arguments of `Layer.state`: the settings of the sublayer's core, and the width of its stream."""
    return getattr(core, "writer", core), sublayer.in_width


def task_view(model: Network, task: str, kinds: Sequence[str]) -> Network:
    """A shallow copy of the model with the modules of one task only, so that a program does not contain all weights."""
    part, key = copy.copy(model), model.packer.keys[task]
    part._modules = {
        "embeds": nn.ModuleDict({kind: model.embeds[kind] for kind in dict.fromkeys(kinds)}),
        "core": model.core,
        "readouts": nn.ModuleDict({key: model.readouts[key]}),
    }
    return part


def read_fields(model: Network, task: str, side: str | None = None) -> list[ReadField]:
    """The fields that a task reads, or those of one side of a pair."""
    pattern, tokenizers = model.packer.patterns[task], model.packer.tokenizers
    fields = pattern.reads if side is None else pattern.sides[side]
    kinds = [tokenizers[field.kind] for field in fields]
    return [ReadField(f.name, f.kind, t.step, not t.causal, t.axes) for f, t in zip(fields, kinds, strict=True)]


def cache_entries(model: Network) -> tuple[Entry, ...]:
    """The tensors of the KV cache."""
    core = model.core.writer if isinstance(model.core, TwoCores) else model.core
    numbers = "order, bidirectional, segment of each token; the order of padding is -1"
    entries = [
        Entry("answer.time", FLOAT, ("batch",), "the time, in steps, at which the answer begins"),
        Entry("answer.segment", INT, ("batch",), "the index of the answer among the fields of its sample"),
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
    for name, layers, token_info in (
        ("cache", cached.keys, cached.token_info),
        ("memory", cached.memory, cached.memory_info),
    ):
        if token_info is not None:
            found[f"{name}.tokens"] = token_info.as_numbers()
        for i, pair in sorted(layers.items()):
            found |= {f"{name}.{part}{i}": x for part, x in zip("kv", pair, strict=True)}
    return found


def _layer_keys(inputs: Mapping[str, Tensor], name: str) -> LayerKeys:
    count = sum(key.startswith(f"{name}.k") for key in inputs)
    return {i: (inputs[f"{name}.k{i}"], inputs[f"{name}.v{i}"]) for i in range(count)}


def _next_outputs(entries: Sequence[Entry], cached: str = "cached") -> Iterator[Entry]:
    """These tensors as outputs, to be inputs of the next step."""
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
    yield Entry(f"{field.name}.place", FLOAT, (*axes, len(field.axes)), PLACE.format(", ".join(field.axes)))
    yield Entry(f"{field.name}.length", INT, ("batch",), "its number of tokens; 0 for a sample that lacks this field")


def _logits(model: Network, task: str) -> Entry:
    symbols = model.readout(task).linear.out_features
    return Entry("logits", FLOAT, ("batch", symbols), "a logit for each id that may be written next")


def _order(token_info: TokenInfo) -> tuple[Tensor, Tensor]:
    """The arguments of `Pool.padded`: the order of the rows (B, T), and the number of tokens (B,)."""
    total_B = token_info.total_B
    return torch.where(token_info.valid_BT, token_info.mask_info.order, total_B[:, None]), total_B
