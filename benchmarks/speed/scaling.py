"""How time and memory of a training step grow as length, width, batch and vocabulary double, beside what theory says."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import median
from typing import Any

from benchmarks.speed.row import Place, Row
from benchmarks.speed.work import ids, train_step


@dataclass(frozen=True)
class Size:
    """A core, a vocabulary, and a batch of `batch` samples of `length` tokens."""

    width: int = 128
    depth: int = 2
    vocab: int = 256
    length: int = 256
    batch: int = 1
    half_bidirectional: bool = False  # whether the first half of each sample is read bidirectionally
    window: int = 0  # tokens that each may look back, itself counted; 0: all


@dataclass(frozen=True)
class Sweep:
    """One setting doubles. time, memory: between what the fitted exponents must lie; theory: what is expected and why."""

    name: str
    setting: str
    values: tuple[int, ...]
    base: Size
    time: tuple[float, float]
    memory: tuple[float, float]
    theory: str


def sweep(name: str, setting: str, values: tuple[int, ...], theory: str, **more: Any) -> Sweep:
    return Sweep(
        name, setting, values, **{"base": Size(), "time": (0.9, 1.1), "memory": (0.9, 1.1), **more}, theory=theory
    )


SWEEPS = (
    sweep(
        "length, causal",
        "length",
        (512, 1024, 2048, 4096),
        "time 1 (products) to 2 (attention), memory 1: no scores are stored",
        time=(1.0, 2.0),
    ),
    sweep(
        "length, half read bidirectionally",
        "length",
        (512, 1024, 2048, 4096),
        "time 1 to 2, memory 1",
        base=Size(half_bidirectional=True),
        time=(1.0, 2.0),
    ),
    sweep("length, window of 64", "length", (1024, 2048, 4096, 8192), "time 1, memory 1", base=Size(window=64)),
    sweep(
        "width",
        "width",
        (512, 1024, 2048),
        "time 2, memory 1 (states) to 2 (gradients of the weights)",
        base=Size(depth=1),
        time=(1.7, 2.1),
        memory=(1.0, 2.1),
    ),
    sweep("batch", "batch", (4, 8, 16, 32), "time 1, memory 1"),
    sweep(
        "vocabulary",
        "vocab",
        (8192, 16384, 32768, 65536),
        "time 1, memory 1 (gradients of embedding and head; logits, where they are stored)",
        base=Size(batch=2),
        time=(0.85, 1.1),
        memory=(0.5, 1.1),
    ),
)


def fitted(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y = a x ** p: least squares of log y over log x."""
    a, b = ([log(v) for v in values] for values in (x, y))
    x0, y0 = sum(a) / len(a), sum(b) / len(b)
    return sum((p - x0) * (q - y0) for p, q in zip(a, b, strict=True)) / sum((p - x0) ** 2 for p in a)


def training_step(size: Size, place: Place) -> tuple[Callable[[], None], float]:
    """A step of AdamW and the floating-point operations that are counted of it."""
    import torch

    import multimodal as mm
    from multimodal.attention import Span
    from multimodal.masks import PREFIX_LM, Window

    mask = PREFIX_LM & Window(size.window) if size.window else PREFIX_LM
    core = mm.Core(width=size.width, depth=size.depth, heads=max(size.width // 64, 1), mask=mask)
    task = "note:text -> text" if size.half_bidirectional else "-> text"
    model = mm.Model({"text": ids(size.vocab)}, core, [task], seed=place.seed).train().to(place.device)
    draw = torch.Generator().manual_seed(place.seed)
    note = size.length // 2 if size.half_bidirectional else 0

    def drawn(count: int) -> Any:
        return torch.randint(size.vocab, (count,), generator=draw)

    samples = []
    for _ in range(size.batch):
        read = {"note": drawn(note)} if note else {}
        samples.append((task, {**read, "text": drawn(size.length - note - 1)}))
    stream = model.packer(samples).to(place.device)
    assert stream.layout.spans == (Span(note, size.length, note),) * size.batch
    tokens = size.batch * size.length
    seen = min(size.window or size.length, size.length / 2)
    head = 2.0 * (tokens - size.batch * note) * size.width * (size.vocab + 1)
    return train_step(model, lambda: model.loss(stream)), 3 * (core.flops(tokens, seen) + head)


def cost(size: Size, place: Place, rounds: int) -> tuple[float, int, float]:
    """CPU seconds of a step (median), its peak memory above weights and moments in bytes, and its counted operations."""
    import torch

    from benchmarks.plan import peak_bytes

    step, flops = training_step(size, place)
    step()  # the moments are there now, and whatever is made once
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        spent.append(time.process_time() - start)
    torch.manual_seed(place.seed)
    return median(spent), peak_bytes(step), flops


def report(place: Place) -> dict[str, Any]:
    import torch

    torch.set_num_threads(place.threads)
    lines = [
        "| doubled | time | counted | memory | expected | CPU seconds, peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    met = []
    for sweep in SWEEPS:
        values = [v // 8 if v >= 256 else v for v in sweep.values[:2]] if place.quick else sweep.values
        found = [cost(replace(sweep.base, **{sweep.setting: v}), place, 1 if place.quick else 3) for v in values]
        seconds, memory, flops = zip(*found, strict=True)
        powers = fitted(values, seconds), fitted(values, memory)
        inside = [low <= p <= high for p, (low, high) in zip(powers, (sweep.time, sweep.memory), strict=True)]
        met += inside
        figures = "; ".join(f"{v}: {s:.2g}, {m / 2**20:.0f}" for v, s, m in zip(values, seconds, memory, strict=True))
        cells = [f"{p:.2f}" + ("" if good else " (!)") for p, good in zip(powers, inside, strict=True)]
        lines.append(
            f"| {sweep.name} | {cells[0]} | {fitted(values, flops):.2f} | {cells[1]} | {sweep.theory} | {figures} |"
        )
    return {"lines": lines, "met": None if place.quick else all(met)}


ROWS = (
    Row(
        name="scaling",
        what=(
            "a training step (width 128, 2 blocks; 1 where the width doubles; AdamW, fp32): exponents fitted to CPU time, to "
            "operations counted and to peak memory above weights and moments; (!) is outside what is expected"
        ),
        report=report,
    ),
)
