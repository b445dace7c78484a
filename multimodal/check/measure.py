"""What the conformance checks and `verify` both measure: logits by sample, gradients between samples, differences of numbers."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.attention import Backend
from multimodal.heads import Prediction
from multimodal.model import Model
from multimodal.stream import Reading, Stream

TOLERANCE = 1e-5  # between fp32 logits; times the largest logit where that is above 1


def logits_by_sample(model: Model, stream: Stream, backend: Backend = "auto") -> list[Tensor]:
    """Logits of each sample, in the order of the pack; of a pair those of both sides."""
    found: dict[int, Tensor] = {}
    for task, logits in model.logits(stream, backend=backend).items():
        reading = stream.readings[task]
        for sample, part in zip(reading.samples, split_logits(logits.float(), reading), strict=True):
            # a head that points has a column for what any sample of the pack has read; those of others are -inf
            own = part[:, ~torch.isneginf(part).all(0)]
            found[sample] = torch.cat([found[sample], own]) if sample in found else own
    return [found[i] for i in sorted(found)]


def split_logits(logits: Tensor, reading: Reading) -> tuple[Tensor, ...]:
    """The logits of each sample, which are those of its rows, or one row of a head that pools them."""
    return logits.split(list(reading.lengths) if len(logits) == sum(reading.lengths) else 1)


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; infinity where the shapes differ, NaN where a number is not one."""
    if got.shape != wanted.shape:
        return torch.inf
    got, wanted = got.detach(), wanted.detach()
    return float(torch.where(got == wanted, 0.0, (got - wanted).abs()).max())  # -inf and -inf are equal


def allowed(*wanted: Tensor) -> float:
    """The largest difference that passes: `TOLERANCE` of the largest finite number, or of 1."""
    return TOLERANCE * max(1.0, *(float(x.detach().nan_to_num(neginf=0.0).abs().max()) for x in wanted))


def same_answer(a: Any, b: Any) -> bool:
    """Whether two answers are equal: ids exactly, features within 1e-3, any other value by ==."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        close = 1e-3 if a.is_floating_point() else 0.0
        return a.shape == b.shape and torch.allclose(a, b, rtol=close, atol=close)
    return bool(np.all(a == b))


def content_or_value(answer: Prediction) -> Any:
    """The tokens of an answer that was written as such, else its value."""
    return answer.value if answer.tokens is None else answer.tokens.content


def owners(stream: Stream) -> dict[str, Tensor]:
    """By kind, the sample that each row of the stream's content belongs to."""
    return _by_kind(stream, stream.layout.info.sample)


def sample_gradients(
    model: Model, stream: Stream, backend: Backend = "auto"
) -> Iterator[tuple[int, dict[str, tuple[float, float]]]]:
    """For each sample (each side of a pair): its number, and by kind the largest gradient of its logits with respect to its own
    content and with respect to the content of other samples.

    Both the rows that the core reads and the features before they are embedded count: an embedding that mixes values shows only in
    the features.
    """
    features = {kind: x.detach().requires_grad_() for kind, x in stream.content.items() if x.is_floating_point()}
    stream = replace(stream, content={**stream.content, **features})
    rows: list[Tensor] = []
    watch = model.core.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    try:
        logits = model.logits(stream, backend=backend)
    finally:
        watch.remove()
    sample_of = owners(stream)
    for task, reading in stream.readings.items():
        starts = accumulate(reading.lengths, initial=0)
        parts = split_logits(logits[task].float(), reading)
        for sample, start, part in zip(reading.samples, starts, parts, strict=False):
            # a random weighted sum of all logits: no gradient cancels another
            total = (part * torch.randn(part.shape).to(part.device)).sum()
            of_rows, *of_features = torch.autograd.grad(
                total, [rows[0], *features.values()], retain_graph=True, allow_unused=True
            )
            # with respect to its own content: of features only the gradient that passes the embedding shows that it is used
            found = [] if of_rows is None else [(k, x, k not in features) for k, x in _by_kind(stream, of_rows).items()]
            found += [(kind, x, True) for kind, x in zip(features, of_features, strict=True) if x is not None]
            own = stream.layout.info.sample[reading.row_N[start]]  # the two sides of a pair are two in the layout
            largest: dict[str, tuple[float, float]] = {}
            for kind, gradient, counts in found:
                mine = sample_of[kind] == own
                others = _largest(gradient[~mine])
                if kind in largest:
                    others = torch.maximum(others, torch.tensor(largest[kind][1]))  # NaN stays NaN
                largest[kind] = float(_largest(gradient[mine])) if counts else 0.0, float(others)
            yield sample, largest


def _by_kind(stream: Stream, rows: Tensor) -> dict[str, Tensor]:
    """Rows in the order of the stream, as they lie in its content: kind after kind."""
    placed = torch.empty_like(rows)
    placed[slice(None) if stream.order_T is None else stream.order_T] = rows
    return dict(zip(stream.content, placed.split([len(x) for x in stream.content.values()]), strict=True))


def _largest(x: Tensor) -> Tensor:
    return x.abs().max().cpu() if x.numel() else torch.zeros(())
