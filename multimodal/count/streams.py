"""What a recipe's data look like once they are packed: lengths, who sees how many, how many rows the heads read; per token."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from multimodal.attention import Layout
from multimodal.attention.plan import is_split
from multimodal.data import preserved_rng
from multimodal.data.frames import as_samples
from multimodal.data.sources import is_indexed, weighed
from multimodal.masks import LAW, PREFIX_LM, Alone, Rule
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.stream import Stream

CHUNK = 16  # samples packed at once while they are counted
ROWS = 1024  # queries whose mask is written out at once


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """Means over a packed stream; everything is a token unless its name says otherwise.

    context: tokens that a token sees. mixed: numbers of the masks that the CPU's fused kernel needs where a sample is neither all
    free nor all causal. kinds: share of the tokens that are embedded as each kind ("head:..." opens what is written).
    rows: rows that each head's readout reads, by its key; wanted: rows that any head reads, or 1 where `Stream.narrowed` keeps all.
    runs: whether a pack holds samples of more than one shape.
    """

    samples: int  # that were counted; 0: given, not counted
    length: float  # tokens of a sample, mean
    longest: int  # of those counted
    context: float
    free: float = 0.0  # share of the tokens that see in both directions
    mixed: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, float] = field(default_factory=dict)
    wanted: float = 1.0
    content: float = 0.0  # bytes of the stream: content, places, targets
    runs: bool = True


def count_stream(
    model: Model,
    data: Mapping[str, Any],
    *,
    samples: int = 256,
    mix: Mapping[str, float] | float | None = None,
    progress: Callable[[int], None] | None = None,
) -> StreamFacts:
    """Pack up to `samples` samples of the data, the tasks in equal shares or as `fit` takes `mix`, and count.

    progress: is told how many samples have been packed since it was last called.
    """
    weight = weighed(data, mix, "plan")
    lengths: list[int] = []
    shapes: set[Any] = set()
    sums: dict[str, float] = {}
    kinds: dict[str, float] = {}
    rows: dict[str, float] = {}
    for pattern, source in data.items():
        model.packer.check_task(pattern)
        wanted = max(1, round(samples * weight[pattern] / sum(weight.values())))
        streams = []
        for chunk in _chunks(_some(source, wanted)):
            with preserved_rng():
                streams.append(model.packer([(pattern, sample) for sample in chunk]))
            if progress is not None:
                progress(len(chunk))
        counted = sum(stream.samples for stream in streams)
        if not counted:
            raise ConfigError(f"plan: the data of task {pattern!r} hold no samples to count; give a length instead")
        for stream in streams:
            lengths += [span.total for span in stream.layout.spans]
            shapes |= {(span.bidirectional, span.total) for span in stream.layout.spans}
            _add(sums, kinds, rows, stream, model, weight[pattern] / counted)
    total = sums["tokens"]
    return StreamFacts(
        samples=len(lengths),
        length=total / sum(weight[pattern] for pattern in data),
        longest=max(lengths),
        context=sums["pairs"] / total,
        free=sums["free"] / total,
        mixed=sums["mixed"] / total,
        kinds={kind: count / total for kind, count in kinds.items()},
        rows={key: count / total for key, count in rows.items()},
        wanted=_wanted(sums["wanted"] / total),
        content=sums["bytes"] / total,
        runs=len(shapes) > 1,
    )


def given_stream(model: Model, length: int) -> StreamFacts:
    """Facts of samples of `length` tokens, none of which are at hand: all causal, embedded as what the first task writes, and all
    read by its head if it writes token by token; else by one row a sample."""
    if length < 1:
        raise ConfigError(f"plan: length={length} must be at least 1 token")
    pattern = next(iter(model.tasks))
    written, head = model.packer.patterns[pattern].writes.kind, model.packer.head(pattern)
    kinds = [f.kind for f in model.packer.patterns[pattern].reads] if not head.writes else [written]
    key, rows = model.packer.head_key(pattern), 1.0 if head.writes else 1.0 / length
    return StreamFacts(
        samples=0,
        length=length,
        longest=length,
        context=(length + 1) / 2,
        kinds={kind: 1 / len(kinds) for kind in kinds},
        rows={key: rows},
        wanted=_wanted(rows),
        content=8.0 + 12 + 4 * 8 + 2 * 8,  # an id, a place, four integers of layout, a row and its target
        runs=False,
    )


def _wanted(share: float) -> float:
    return share if share <= 0.5 else 1.0


def seen_pairs(rule: Rule, layout: Layout) -> int:
    """How many (query, key) pairs of a pack the mask lets meet, by the mask itself."""
    rule = rule if rule == PREFIX_LM else LAW & Alone(rule)
    found, start = 0, 0
    for span in layout.spans:
        here = layout.info[start : start + span.total]
        for first in range(0, span.total, ROWS):
            found += int(rule.allows(here[first : first + ROWS][:, None], here[None]).sum())
        start += span.total
    return found


def _add(
    sums: dict[str, float],
    kinds: dict[str, float],
    rows: dict[str, float],
    stream: Stream,
    model: Model,
    weight: float,
) -> None:
    spans = stream.layout.spans
    found = {
        "tokens": len(stream),
        "pairs": seen_pairs(model.core.core.mask, stream.layout),
        "free": int((stream.layout.info.bidirectional != 0).sum()),
        # samples of one shape lie side by side, and share a mask
        "mixed": sum(
            s.total**2 for s in set(spans) if (0 < s.bidirectional < s.total or s.bidirectional < 0) and not is_split(s)
        ),
        "bytes": sum(t.nbytes for t in stream_tensors(stream)),
        "wanted": sum(len(x) for r in stream.readings.values() for x in (r.row_N, r.key_N) if x is not None),
    }
    for name, count in found.items():
        sums[name] = sums.get(name, 0.0) + weight * count
    for kind, content in stream.content.items():
        kinds[kind] = kinds.get(kind, 0.0) + weight * len(content)
    for pattern, reading in stream.readings.items():
        key = model.packer.head_key(pattern)
        rows[key] = rows.get(key, 0.0) + weight * len(reading.row_N)


def stream_tensors(stream: Stream) -> Iterable[Tensor]:
    """Everything that a packed stream holds."""
    yield from stream.content.values()
    yield from vars(stream.layout.info).values()
    yield stream.position_TA
    for reading in stream.readings.values():
        yield from (value for value in vars(reading).values() if isinstance(value, Tensor))
    if stream.order_T is not None:
        yield stream.order_T


def _some(source: Any, wanted: int) -> Iterable[Any]:
    """Samples spread evenly over a source with a length, or the first ones of one that is only iterated."""
    source = as_samples(source)
    if is_indexed(source):
        count = min(wanted, len(source))
        return (source[i * len(source) // count] for i in range(count))
    return islice(iter(source), wanted)


def _chunks(samples: Iterable[Any]) -> Iterable[list[Any]]:
    samples = iter(samples)
    while chunk := list(islice(samples, CHUNK)):
        yield chunk
