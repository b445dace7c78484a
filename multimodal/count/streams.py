"""Statistics of packed data, a token: lengths, how many tokens see how many, how many rows the heads read."""

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

CHUNK = 16  # samples that are packed at once
ROWS = 1024  # queries whose mask is computed at once


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """Means over a packed stream.

    samples: number of samples that were counted; 0 where a length was given instead.
    length: mean number of tokens of a sample.
    longest: number of tokens of the longest sample counted.
    context: mean number of tokens that a token sees.
    bidirectional: share of the tokens that see in both directions.
    mixed: mask entries a token that the CPU's fused kernel needs for samples that are neither all bidirectional nor all causal.
    kinds: share of the tokens that are embedded as each kind; "head:..." is the start token of what is written.
    rows: rows that each head reads, a token, by the head's key.
    wanted: rows that any head reads, a token, or 1 where `Stream.narrowed` keeps all.
    content: bytes of the stream a token: content, places, targets.
    runs: whether a pack holds samples of more than one shape.
    """

    samples: int
    length: float
    longest: int
    context: float
    bidirectional: float = 0.0
    mixed: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, float] = field(default_factory=dict)
    wanted: float = 1.0
    content: float = 0.0
    runs: bool = True


def count_stream(
    model: Model,
    data: Mapping[str, Any],
    *,
    samples: int = 256,
    mix: Mapping[str, float] | float | None = None,
    progress: Callable[[int], None] | None = None,
) -> StreamStats:
    """Statistics of up to `samples` samples of the data, the tasks in equal shares or as `fit` takes `mix`.

    progress: called with the number of samples packed since its last call.

    Raises:
        ConfigError: the data of a task hold no samples.
    """
    weight = weighed(data, mix, "plan")
    lengths: list[int] = []
    shapes: set[Any] = set()
    sums: dict[str, float] = {}
    kinds: dict[str, float] = {}
    rows: dict[str, float] = {}
    # each task is averaged by itself and then weighed, so that the number of its samples does not matter
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
    return StreamStats(
        samples=len(lengths),
        length=total / sum(weight[pattern] for pattern in data),
        longest=max(lengths),
        context=sums["pairs"] / total,
        bidirectional=sums["bidirectional"] / total,
        mixed=sums["mixed"] / total,
        kinds={kind: count / total for kind, count in kinds.items()},
        rows={key: count / total for key, count in rows.items()},
        wanted=_wanted(sums["wanted"] / total),
        content=sums["bytes"] / total,
        runs=len(shapes) > 1,
    )


def stream_of_length(model: Model, length: int) -> StreamStats:
    """Statistics of samples of `length` tokens where there are no data: causal, and all of the first task.

    A head that writes token by token reads every row, and all tokens are embedded as what it writes; any other head reads one row
    a sample.

    Raises:
        ConfigError: a length below 1.
    """
    if length < 1:
        raise ConfigError(f"plan: length={length} must be at least 1 token")
    pattern = next(iter(model.tasks))
    written, head = model.packer.patterns[pattern].fields[-1].kind, model.packer.head(pattern)
    kinds = [f.kind for f in model.packer.patterns[pattern].reads] if not head.autoregressive else [written]
    key, rows = model.packer.head_key(pattern), 1.0 if head.autoregressive else 1.0 / length
    return StreamStats(
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
    """Number of (query, key) pairs of a pack that the mask allows, by the mask itself."""
    rule = rule if rule == PREFIX_LM else LAW & Alone(rule)
    found, start = 0, 0
    # a sample at a time and some rows at a time: the mask of a whole pack may not fit into memory
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
        "bidirectional": int((stream.layout.info.bidirectional != 0).sum()),
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
    yield from (info := stream.layout.info).numbers
    if info.links is not None:
        yield info.links.number
        yield from (value for value in vars(info.links.table).values() if isinstance(value, Tensor))
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
