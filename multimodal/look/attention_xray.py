"""The X-ray of one input: runs the model, collects what each attention layer did, and saves it as picture, page or JSON.

sample --one pass--> Trace --> LayerXRay of every attention layer --> pictures (drawing.py), a page (page.py)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from multimodal.attention import Seen, Trace
from multimodal.composite import Composed
from multimodal.files import write_atomic
from multimodal.heads import Prediction
from multimodal.heads.base import encode_field
from multimodal.look.layer_xray import NAMES, LayerXRay
from multimodal.look.layers import START, picture_and_grid, read_values, token_labels, transformers
from multimodal.model import Model
from multimodal.notebook import tables_html
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, TaskError, did_you_mean
from multimodal.stream import Stream
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class XRayField:
    """The tokens of one field of the sample.

    name: of the field.
    kind: of the field.
    row_N: the row of the stream that each token is.
    labels: a short name for each token.
    text: whether the kind is text.
    written: whether the field is the answer.
    learned: how many of its tokens, the first ones, are no part of the picture.
    picture_YXC: the field as a picture in 0..1, where its tokenizer makes one.
    grid: rows and columns of the other tokens in the picture.
    second_N: the time of each token, where its tokenizer counts in seconds.
    equal: how many tokens at its end hold the same, such as padding.
    """

    name: str
    kind: str
    row_N: Tensor
    labels: tuple[str, ...]
    text: bool = False
    written: bool = False
    learned: int = 0
    picture_YXC: Tensor | None = None
    grid: tuple[int, int] = (1, 1)
    second_N: Tensor | None = None
    equal: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def flat(self) -> bool:
        """Whether its tokens tile a picture in both directions."""
        return self.picture_YXC is not None and self.grid[0] > 1


@dataclass(frozen=True)
class XRay:
    """All attention layers of one forward pass over one sample.

    task: the task that was answered.
    fields: the fields in the order of their rows: those that are read, the start token, the answer.
    asked_N: the rows of the stream that the task's head reads; their queries are the asked queries.
    layers: every attention layer, in the order of the pass.
    prediction: the model's answer.
    model: the model.
    sample: the fields that were read, and the answer's tokens.
    """

    STOP: ClassVar[str] = "[stop]"

    task: str
    fields: dict[str, XRayField]
    asked_N: Tensor
    layers: tuple[LayerXRay, ...]
    prediction: Prediction
    model: Model = field(repr=False)
    sample: Mapping[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> LayerXRay:
        """The layer of this name.

        Raises:
            ConfigError: there is no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise ConfigError(f"XRay: there is no layer {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")

    @property
    def reads(self) -> list[XRayField]:
        """The fields that were read."""
        return [f for f in self.fields.values() if not f.written and f.name != START]

    @property
    def written(self) -> XRayField | None:
        """The answer's field; None of a head that answers at once."""
        return next((f for f in self.fields.values() if f.written), None)

    @property
    def written_labels(self) -> list[str]:
        """A label for each row that the head reads: the tokens written, then the stop; "answer" of a head that answers at once."""
        if self.written is None:
            return ["answer"] if len(self.asked_N) == 1 else [str(i) for i in range(len(self.asked_N))]
        return [*self.written.labels, self.STOP][: len(self.asked_N)]

    def asked(self, layer: LayerXRay) -> Tensor:
        """Indices of a layer's asked queries: the rows that the task's head reads, or all queries in a core without such rows."""
        (index_N,) = torch.isin(layer.query_T, self.asked_N).nonzero(as_tuple=True)
        return index_N if len(index_N) else torch.arange(len(layer.query_T))

    def onto(self, layer: LayerXRay, name: str) -> Tensor | None:
        """Responsibilities (H, T, N) of the asked queries for the tokens of a field; None: no key of the layer is one of them."""
        if layer.key_M is None:
            return None
        row_N = self.fields[name].row_N
        where_NM = row_N[:, None] == layer.key_M
        if not bool(where_NM.any()):
            return None
        part = layer.responsibility_HTM[:, self.asked(layer)]
        return part @ where_NM.double().T

    def heat(self, layer: LayerXRay, name: str) -> Tensor | None:
        """The share of each head's attention (H, N) on each token of a field, averaged over the asked queries."""
        part = self.onto(layer, name)
        return None if part is None else part.mean(1)

    def looking_at(self, name: str) -> Iterator[tuple[LayerXRay, Tensor]]:
        """The layers that attend to a field, with `heat`."""
        for layer in self.layers:
            if (heat_HN := self.heat(layer, name)) is not None:
                yield layer, heat_HN

    def even(self, layer: LayerXRay) -> float:
        """The share of each key under uniform attention: the mean over asked queries of 1 / (keys they may see)."""
        count_HN = layer.seen_HTM[:, self.asked(layer)].sum(-1)
        return float(torch.where(count_HN > 0, 1 / count_HN.clamp(min=1), 0.0).mean())

    @cached_property
    def sink(self) -> int | None:
        """The first row, if it sees itself alone and still gets a third of all attention and three times an even share; else None.

        Heads that find nothing to read look there (Xiao et al. 2023, "attention sinks").
        """
        shares, even = [], []
        for layer in self.layers:
            if layer.key_M is None or int(layer.key_M[0]) or int(layer.query_T[0]):
                continue
            if not bool((layer.seen_HTM[:, 0].sum(-1) == 1).all()):
                return None
            shares.append(float(layer.share_HTM[:, self.asked(layer), 0].mean()))
            even.append(self.even(layer))
        return 0 if shares and sum(shares) > max(len(shares) / 3, 3 * sum(even)) else None

    def sunk(self, name: str) -> int | None:
        """The index of the sink among the tokens of a field, if it is one of them."""
        row_N = self.fields[name].row_N
        return 0 if self.sink is not None and int(row_N[0]) == self.sink else None

    def sharpness(self, layer: LayerXRay) -> Tensor:
        """How far the attention of each head (H,) is from even, in nats: the mean over asked queries of sum_j r_j log(keys r_j).

        The sum leaves out the sink and the learned tokens of fields. It is 0 if attention is even, and below 0 if the keys that
        remain get less than even shares, because most of the attention is on those that are left out.
        """
        share_HTM, seen_HTM = (x[:, self.asked(layer)] for x in (layer.share_HTM, layer.seen_HTM))
        away_HTM = torch.xlogy(share_HTM, share_HTM * seen_HTM.sum(-1, keepdim=True))
        idle = [f.row_N[: f.learned] for f in self.fields.values()] + [
            torch.tensor([-1 if self.sink is None else self.sink])
        ]
        if layer.key_M is not None:
            away_HTM = away_HTM * ~torch.isin(layer.key_M, torch.cat(idle))
        return away_HTM.sum(-1).mean(-1)

    def chosen_heads(self, most: int = 16) -> dict[str, tuple[int, ...]]:
        """The heads of each layer that a picture shows: all if there are at most `most`, otherwise those of the last block and
        the `most` others of the largest `sharpness`."""
        every = [(layer, h) for layer in self.layers for h in range(layer.heads)]
        if len(every) > most:
            # the task's head reads the output of the last block, so all heads of it are shown
            last = _block(self.layers[-1])
            sharpness = {layer.name: self.sharpness(layer).tolist() for layer in self.layers}
            others = [(layer, h) for layer, h in every if _block(layer) != last]
            others.sort(key=lambda head: -sharpness[head[0].name][head[1]])
            sharpest = {(layer.name, h) for layer, h in others[:most]}
            every = [(layer, h) for layer, h in every if _block(layer) == last or (layer.name, h) in sharpest]
        return {layer.name: tuple(h for other, h in every if other is layer) for layer in self.layers}

    def key_label(self, layer: LayerXRay, key: int) -> str:
        """The name of a key: "text 'cat' (token 3)", 'image row 2, column 0', 'slot 7'; all counted from 0."""
        if layer.key_M is None:
            return f"slot {key}"
        row = int(layer.key_M[key])
        for f in self.fields.values():
            (index,) = (f.row_N == row).nonzero(as_tuple=True)
            if len(index):
                label, at = f.labels[int(index[0])], int(index[0])
                return (
                    START if f.name == START else f"{f.name} {label!r} (token {at})" if f.text else f"{f.name} {label}"
                )
        return f"row {row}"

    def influential_keys(self, layer: LayerXRay, most: int = 5) -> list[tuple[str, float]]:
        """The keys whose removal changes a layer's read most, with the change |o_-j - o| over all heads: mean of asked queries.

        A query that sees no other key is excluded from the mean.
        """
        change_TM = layer.only(self.asked(layer)).change_HTM.square().sum(0).sqrt()
        mean_M = change_TM.nanmean(0).nan_to_num(0.0)
        best = mean_M.topk(min(most, len(mean_M)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.key_label(layer, j), change) for j, change in pairs if change > 0]

    def table(self) -> list[dict[str, Any]]:
        """A row for each head: layer, head, and the means of its read-outs over all queries of the layer."""
        return [
            {"layer": layer.name, "head": h, **numbers}
            for layer in self.layers
            for h, numbers in enumerate(layer.summary())
        ]

    def __str__(self) -> str:
        """The table of heads as text."""
        return self.lines(self.table())

    def _repr_html_(self) -> str:
        """For notebooks: the answer, the fields, and the read-outs of every head; `page` writes all of it."""
        fields = [(f.name, f.kind, len(f), "written" if f.written else "read") for f in self.fields.values()]
        heads = [(row["layer"], row["head"], *(float(row[n]) for n in NAMES if n in row)) for row in self.table()]
        tables = {"fields": fields, f"layer, head, {', '.join(NAMES.values())}": heads}
        return self.prediction._repr_html_() + tables_html(f"XRay of {self.task}", tables)

    def lines(self, rows: list[dict[str, Any]]) -> str:
        """Rows of `table` as text, under a heading."""
        width = max(len(row["layer"]) for row in rows)
        columns = ("effective", "evidence", "prior", "score")
        lines = [f"{'layer':<{width}}  head  " + "  ".join(NAMES[name] for name in columns)]
        for row in rows:
            numbers = "  ".join(f"{row[name]:>{len(NAMES[name])}.2f}" for name in columns)
            lines.append(f"{row['layer']:<{width}}  {row['head']:>4}  {numbers}")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Write one picture of the heads (of more than 16 those of `chosen_heads`): .png, .jpg, .pdf or .svg.

        Raises:
            ConfigError: another suffix, or a folder that does not exist.
        """
        from multimodal.look.drawing import draw

        _check_path("XRay.draw", path, (".png", ".jpg", ".pdf", ".svg"))
        draw(self, path)

    def page(self, path: str | Path) -> None:
        """Write one HTML file with everything, for any browser; it needs no network.

        Raises:
            ConfigError: another suffix than .html or .htm, or a folder that does not exist.
        """
        from multimodal.look.page import page

        _check_path("XRay.page", path, (".html", ".htm"))
        write_atomic(Path(path), page(self).encode("utf-8", "replace"))


def xray(model: Model, task: str, sample: Mapping[str, Any], *, answer: Any = None) -> XRay:
    """Record every attention layer while the model answers one sample.

    sample: the fields that the task reads, of a pair those of one side; the field that a task writes is ignored.
    answer: the answer of a task that writes, a value of that kind; the model's own answer unless given.

    Raises:
        TaskError: there is no such task, a field is missing, or both sides of a pair are there. ConfigError: several samples; a
        model without attention; an answer for a task that answers at once.

    Examples:
        >>> ray = xray(model, "image -> label", {"image": square})
        >>> ray["block 1 self"].posterior_HTM.shape[0]  # query heads
        2
        >>> picture, page = ray.draw("xray.png"), ray.page("xray.html")
    """
    packer = model.packer
    packer.check_task(task)
    pattern, head = packer.patterns[task], packer.head(task)
    if answer is not None and not head.autoregressive:
        raise ConfigError(
            f"xray: task {task!r} is answered at once by {type(head).__name__}, which never sees an answer; leave answer= out"
        )
    if isinstance(sample, (list, tuple)):
        raise ConfigError("xray: give one sample, not a list of them")
    if pattern.pair:
        sample = _one_side(pattern, sample)
    pattern.check_sample(sample, answer=False)
    sample = {f.name: sample[f.name] for f in pattern.reads}
    prediction = None
    if answer is not None:
        tokens = encode_field(packer.answer_tokenizers[task], answer, "xray", pattern.answer)
        prediction = Prediction(answer, math.nan, tokens=tokens)
    elif head.autoregressive:
        prediction = model.predict(task, [sample])[0]
    if prediction is not None and prediction.tokens is not None and len(prediction.tokens):
        sample[pattern.answer] = prediction.tokens
    trace = Trace()
    # the dense backend has the whole table of weights, which fused kernels never write down
    with model.inference_mode():
        stream = model.pack(task, [sample], answers=pattern.answer in sample)
        state_TD = model(stream, backend="dense", trace=trace)
        if prediction is None:
            r = stream.readings[task]
            logits = head.logits(model.readout(task), state_TD[r.row_N], r.lengths, **head.inputs(r, state_TD))
            if pattern.pair:
                prediction = Prediction(logits[0].float().cpu(), math.nan)
            else:
                more = head.answer_inputs(r, stream.position_TA)
                prediction = head.answer(logits, r.lengths, packer.tokenizers[pattern.writes.kind], **more)[0]
    if not trace.seen:
        raise ConfigError(
            "xray: no layer of this model attends, so there is no posterior to look at; a core's block needs SelfAttention, "
            "CrossAttention or PersistentMemory"
        )
    fields = _fields(model, task, sample, stream)
    layers = _layers(model, trace, stream)
    return XRay(task, fields, stream.readings[task].row_N.cpu(), layers, prediction, model, sample)


def _one_side(pattern: Pattern, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with None for the fields of the side that it lacks."""
    sides = [[f.name for f in fields] for fields in pattern.sides.values()]
    given = [names for names in sides if any(sample.get(name) is not None for name in names)]
    if len(given) != 1:
        left, right = (" ".join(names) for names in sides)
        came = "both" if given else "none"
        raise TaskError(
            f"xray: task {pattern.text!r} has two sides, and {came} came; give the fields of one, {left} or {right}"
        )
    return {**sample, **dict.fromkeys(name for names in sides if names != given[0] for name in names)}


def _check_path(who: str, path: str | Path, endings: tuple[str, ...]) -> None:
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ConfigError(
            f"{who}: {path.name!r} does not end in {' or '.join(endings)}; name it {path.stem}{endings[0]}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{who}: there is no folder {str(path.parent)!r} to write {path.name} into; make it first")


def _block(layer: LayerXRay) -> str:
    """The block of a layer: 'writer block 2' of 'writer block 2 cross'."""
    core, _, rest = layer.name.partition("block ")
    return f"{core}block {rest.split()[0]}"


def _layers(model: Model, trace: Trace, stream: Stream) -> tuple[LayerXRay, ...]:
    """A LayerXRay for every record of the trace, with the rows of the stream that its queries and keys are."""
    # reader and writer give their layers the same names, so modules are identified by id
    core_of = {id(module): name for name, core in transformers(model).items() for module in core.modules()}
    total, read = stream.layout.spans[0].total, stream.layout.spans[0].read
    ranges = {"": range(total), "reader": range(read), "writer": range(read, total)}
    found: list[LayerXRay] = []
    for seen in trace.seen:
        core = core_of[id(seen.mechanism)]
        queries = torch.tensor(ranges[core])
        count = seen.value_BMHK.shape[1]
        # a writer's memory may be the last states of the reader only, so its keys are the last `count` rows that were read
        kind = seen.name.rsplit(" ", 1)[-1]
        keys = {"memory": None, "cross": torch.arange(read - count, read)}.get(kind, queries)
        title = f"{core} {seen.name}".strip()
        again = sum(layer.name == title or layer.name.startswith(f"{title} (") for layer in found)
        found.append(_layer(seen, f"{title} ({again + 1})" if again else title, queries, keys))
    return tuple(found)


def _layer(seen: Seen, name: str, query_T: Tensor, key_M: Tensor | None) -> LayerXRay:
    # float64, so that differences of nearly equal reads have digits
    def alone(x: Tensor) -> Tensor:
        return x[0].detach().double().cpu()

    assert seen.mechanism is not None
    return LayerXRay(
        name,
        query_T,
        key_M,
        alone(seen.score_BHTM),
        alone(seen.log_prior_BHTM),
        alone(seen.weight_BHTM),
        alone(seen.value_BMHK),
        alone(seen.read_BTHK),
        seen.mechanism.read,
        None if seen.choice is None else seen.choice.key_BHT[0].cpu(),
        bool(seen.mechanism.factors),
    )


def _fields(model: Model, task: str, sample: Mapping[str, Any], stream: Stream) -> dict[str, XRayField]:
    """The sample's fields in the order of its rows."""
    packer = model.packer
    pattern, head = packer.patterns[task], packer.head(task)
    fields: dict[str, XRayField] = {}
    start = 0
    for name, kind, tokens in read_values(packer, task, sample):
        fields[name] = _field(name, kind, packer.tokenizers[kind], tokens, start, written=False)
        start += len(tokens)
    # of a pair's two learned tokens each side has its own
    begin = len(packer.starts[task].tokens)
    if begin := min(begin, 1) if pattern.pair else begin:
        rows = torch.arange(start, start + begin)
        fields[START] = XRayField(START, START, rows, (START,) * begin)
        start += begin
    if pattern.answer in sample and head.autoregressive:
        kind, tokens = pattern.writes.kind, sample[pattern.answer]
        tokenizer = packer.written_parts.get(kind, packer.tokenizers[kind])
        written = _field(pattern.answer, kind, tokenizer, tokens, start, written=True)
        reading = stream.readings[task]
        if reading.key_N is not None and reading.pointed_N is not None and not written.text:
            written = replace(written, labels=_pointed(fields, reading.key_N[reading.pointed_N].tolist()))
        fields[pattern.answer] = written
        start += len(tokens)
    assert start == len(stream)
    return fields


def _pointed(fields: Mapping[str, XRayField], rows: list[int]) -> tuple[str, ...]:
    """The names of the rows that were pointed at, as the field that was read names them."""
    names = {row: label for f in fields.values() for row, label in zip(f.row_N.tolist(), f.labels, strict=True)}
    return tuple(names[row] for row in rows)


def _field(name: str, kind: str, tokenizer: Tokenizer, tokens: Tokens, start: int, *, written: bool) -> XRayField:
    if not isinstance(tokens, Composed):
        tokens = Tokens(tokens.content.cpu(), tokens.position_NA.cpu())
    picture_YXC, grid = picture_and_grid(tokenizer, tokens)
    content_NF = tokens.content.reshape(len(tokens), -1)
    others = (content_NF != content_NF[-1]).any(-1).nonzero().flatten().tolist()
    return XRayField(
        name,
        kind,
        torch.arange(start, start + len(tokens)),
        tuple(token_labels(tokenizer, tokens)),
        tokenizer.text,
        written,
        tokenizer.learned,
        picture_YXC,
        grid,
        tokens.position_NA[:, 0] if tokenizer.step[0] != 1 else None,
        len(tokens) - 1 - (others[-1] if others else -1),
    )
