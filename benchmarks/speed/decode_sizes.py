"""Greedy decoding at the sizes of SmolLM2-135M and Llama-3.2-1B beside Hugging Face's, with the bytes that a step has to read.

Weights are random and the same on both sides, which write in one process and in turn, so that load hits both alike. A step's floor
is the bytes of weights, keys and values over the rate at which this machine sums as many bytes.
"""

import copy
import gc
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.speed.row import Place, Row
from benchmarks.speed.work import from_llama, ids, their_llama

TASK = "text:ids -> ids"
Times = tuple[float, list[float]]  # seconds until the first token, and of each step after it


@dataclass(frozen=True)
class Size:
    """A model, and what is asked of it. cases: (answers, tokens of a prompt). new: steps that are timed."""

    width: int
    depth: int
    heads: int
    groups: int
    hidden: int
    vocab: int
    cases: tuple[tuple[int, int], ...] = ((1, 64), (4, 64), (16, 64), (1, 2048), (4, 2048), (16, 2048))
    new: int = 24
    rounds: int = 3


SMALL = Size(width=576, depth=30, heads=9, groups=3, hidden=1536, vocab=49152)
LARGE = Size(
    width=2048,
    depth=16,
    heads=32,
    groups=8,
    hidden=8192,
    vocab=128256,
    cases=((1, 64), (4, 64), (16, 64), (1, 2048)),
    new=12,
    rounds=2,
)
QUICK = {
    "width": 64,
    "depth": 2,
    "heads": 4,
    "groups": 2,
    "hidden": 96,
    "vocab": 300,
    "cases": ((1, 8), (2, 8)),
    "new": 4,
}
GOALS = {  # (precision, answers): the least that the other's step is to take, in steps of ours
    ("float32", 1): 2.0,
    ("float32", 16): 1.2,
    ("bfloat16", 1): 2.0,
    ("bfloat16", 16): 1.2,
    ("int8", 1): 1.5,
}


def models(place: Place) -> tuple[Any, Any]:
    """(ours, theirs) in float32, with the same weights; the last id stops an answer and is never the likeliest."""
    import torch

    import multimodal as mm

    size = place.sizes
    settings = {"num_key_value_heads": size.groups, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    theirs = their_llama(size, size.vocab, place, **settings).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight[-1] = 0
    core = mm.Core(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        kv_heads=size.groups,
        mlp_width=size.hidden,
        qk_norm=False,
        rotary_split=(1, 0, 0),
    )
    head = mm.NextToken(tied=True, start_ids=(), stop_id=size.vocab - 1, bias=False)
    ours = mm.Model({"ids": ids(size.vocab, causal=True)}, core, [mm.Task(TASK, head)], seed=place.seed).eval()
    ours.load_state_dict(from_llama(theirs.state_dict(), size.heads, "ids", groups=size.groups, tied=True))
    return ours, theirs


def our_times(model: Any, prompts: Any, new: int) -> tuple[Times, Any]:
    """The times of `Engine`, and the ids."""
    import torch

    import multimodal as mm

    engine = mm.Engine(model, rows=len(prompts), capacity=prompts.shape[1] + new + 3)
    clock, found, spent = time.perf_counter(), {}, []
    for row in prompts.tolist():
        engine.submit(TASK, {"text": row}, max_tokens=new + 2)
    while engine.busy:
        for piece in engine.step():
            if piece.error is not None:
                raise piece.error
            if piece.prediction is not None:
                found[piece.ticket] = piece.prediction.value
        spent.append(time.perf_counter() - clock)
        clock += spent[-1]
    # the first step reads the prompts and writes two tokens
    return (spent[0] - median(spent[1:]), spent[1:]), torch.stack([found[i] for i in range(len(found))])


def their_times(model: Any, prompts: Any, new: int) -> tuple[Times, Any]:
    """The times of `generate`, and the ids."""
    import torch

    ticks = [time.perf_counter()]

    def ticked(*_: Any, **__: Any) -> Any:
        ticks.append(time.perf_counter())
        return torch.zeros(len(prompts), dtype=torch.bool)

    options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": new + 2}
    with torch.inference_mode():
        written = model.generate(prompts, stopping_criteria=[ticked], **options)[:, prompts.shape[1] :]
    spent = [b - a for a, b in pairwise(ticks)]
    return (spent[0], spent[1:]), written


def rate(count: int) -> float:
    """Bytes a second of reading `count` bytes, the best of several readings."""
    import torch

    numbers = torch.ones(max(1, count // 4))
    best = float("inf")
    for _ in range(7):
        clock = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - clock)
    return 4 * len(numbers) / best


def pairs(ours: Any, theirs: Any) -> dict[str, Callable[[], tuple[Any, Any, int]]]:
    """By precision, what makes (ours, theirs, bytes of a number in our cache)."""
    import torch

    import multimodal as mm

    def their_int8() -> Any:
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(copy.deepcopy(theirs), {torch.nn.Linear}, dtype=torch.qint8)

    return {
        "float32": lambda: (ours, theirs, 4),
        "bfloat16": lambda: (mm.quantize(ours, "bfloat16"), copy.deepcopy(theirs).bfloat16(), 4),
        "int8": lambda: (mm.quantize(ours, "int8"), their_int8(), 4),
    }


def report(place: Place, size: Size) -> dict[str, Any]:
    """A line for each precision and case. met: whether every step that has a goal reaches it."""
    import torch

    size = replace(size, **QUICK, rounds=1) if place.quick else size
    place = replace(place, sizes=size)
    ours32, theirs32 = models(place)
    a_token = 2 * size.depth * size.groups * (size.width // size.heads)  # numbers in the cache
    lines, met = [*HEAD], []
    for precision, make in pairs(ours32, theirs32).items():
        ours, theirs, bytes_a_number = make()
        weights = sum(p.nbytes for p in ours.parameters())
        for batch, prompt in size.cases:
            draw = torch.Generator().manual_seed(place.seed)
            prompts = torch.randint(1, size.vocab - 1, (batch, prompt), generator=draw)
            sides = {"ours": partial(our_times, ours), "theirs": partial(their_times, theirs)}
            if precision != "float32" and batch == 1:
                sides["float32"] = partial(their_times, theirs32)
            found, ids_of = timed(sides, prompts, size)
            same = float((ids_of["ours"] == ids_of["theirs"]).float().mean())
            read = weights + bytes_a_number * a_token * batch * (prompt + size.new / 2)
            step = {name: times[1] for name, times in found.items()}
            ratio, share = step["theirs"] / step["ours"], read / rate(int(read)) / step["ours"]
            goal = GOALS.get((precision, batch))
            met += [] if goal is None else [ratio >= goal]
            cells = [
                precision,
                f"{batch} x {prompt}",
                f"{1e3 * step['ours']:.1f}",
                f"{1e3 * step['theirs']:.1f}",
                f"{ratio:.2f}" + ("" if goal is None or ratio >= goal else f" (goal {goal:g})"),
                f"{step['float32'] / step['ours']:.2f}" if "float32" in step else "",
                f"{share:.0%}",
                f"{found['ours'][0]:.3f}",
                f"{found['theirs'][0] / found['ours'][0]:.2f}",
                f"{same:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        del ours, theirs
        gc.collect()
    return {"lines": lines, "met": None if place.quick else all(met)}


HEAD = (
    "| precision | answers x prompt | a step, ms | theirs, ms | theirs / ours | their float32 / ours | of the floor | prompt, s "
    "| theirs / ours | same ids |",
    f"|{'---|' * 10}",
)


def timed(
    sides: Mapping[str, Callable[[Any, int], tuple[Times, Any]]], prompts: Any, size: Size
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """By side, the median seconds of the prompt and of a step, and the ids; the sides take turns."""
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    ids_of: dict[str, Any] = {}
    for run in sides.values():
        run(prompts[:, :16], 2)  # what is made once, such as packed weights
    for _ in range(size.rounds):
        for name, run in sides.items():
            (first, each), ids_of[name] = run(prompts, size.new)
            firsts[name].append(first)
            steps[name] += each
    return {name: (median(firsts[name]), median(steps[name])) for name in sides}, ids_of


ROWS = tuple(
    Row(name=name, what=what, needs=("transformers",), report=partial(report, size=size))
    for name, what, size in (
        (
            "decode-135m",
            "greedy decoding by a model of SmolLM2-135M's shape, beside transformers (sdpa, dynamic cache)",
            SMALL,
        ),
        (
            "decode-1b",
            "greedy decoding by a model of Llama-3.2-1B's shape, beside transformers (sdpa, dynamic cache)",
            LARGE,
        ),
    )
)
